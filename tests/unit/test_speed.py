"""What a worker tells a router of its speed."""

from __future__ import annotations

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.models import resolve_model
from expert_service.speed import UNIT_READ_NS, UNIT_ROW_NS, measure


def test_a_stated_speed_divides_both_times() -> None:
    checkpoint = Checkpoint(resolve_model("shape:tiny"))
    arithmetic = find_arithmetic("int8", "bfloat16", checkpoint.config.hidden_size, checkpoint.config.expert_size)
    weights = arithmetic.prepare(checkpoint.expert(checkpoint.config.expert_layers()[0], 0))
    assert measure(arithmetic, [weights], checkpoint.config.hidden_size, 4.0) == (UNIT_ROW_NS / 4, UNIT_READ_NS / 4)
    for experts in ([weights], [weights] * 3):
        for found in measure(arithmetic, experts, checkpoint.config.hidden_size):
            assert 0 < found < 10**9
