"""Serving policies over the routing: pure functions, and what an engine does with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.config import AdaptiveK, Config
from consilium.errors import ConfigError
from consilium.gate import Routing, softmax_top_k
from consilium.gate_policies import adaptive_k, limit_load
from consilium.gate_rule import GateRule
from gateway.batches import group_by_expert
from gateway.gate_policy import GatePolicy, find_policy
from tests.tiny_models import save_qwen3_moe
from tests.unit.model_configs import tiny_config
from tests.unit.served_engine import Served, greedy, prompt


def routed(rows: int, experts: int, top_k: int, seed: int) -> tuple[Routing, Tensor]:
    """A routing, and the scores it was chosen by."""
    logits = 2 * torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    return softmax_top_k(logits, top_k, normalize=False), logits.softmax(-1)


def test_the_fewest_experts_that_have_the_mass() -> None:
    routing = Routing(torch.tensor([[0, 2, 5, 7]] * 2), torch.tensor([[0.1, 0.5, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2]]))
    found = adaptive_k(routing, 0.7, 1, 4)
    assert found.kept is not None
    assert found.kept.tolist() == [[False, True, True, False], [True, True, True, False]]
    torch.testing.assert_close(found.weights.sum(-1), routing.weights.sum(-1))
    torch.testing.assert_close(found.weights[0], torch.tensor([0, 0.5, 0.15, 0]) * (0.8 / 0.65))
    bounded = [adaptive_k(routing, 0.7, *bounds).kept for bounds in ((3, 4), (1, 1))]
    assert [int(each.sum()) for each in bounded if each is not None] == [6, 2]


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), top_k=st.integers(1, 6), mass=st.floats(0.05, 1), seed=st.integers(0, 99))
def test_adaptive_k_treats_every_row_by_itself(rows: int, top_k: int, mass: float, seed: int) -> None:
    routing, _ = routed(rows, 12, top_k, seed)
    together = adaptive_k(routing, mass, 1, top_k)
    assert together.kept is not None
    assert together.kept.any(-1).all()
    for row in range(rows):
        alone = adaptive_k(Routing(routing.ids[row, None], routing.weights[row, None]), mass, 1, top_k)
        assert alone.kept is not None
        assert torch.equal(alone.kept[0], together.kept[row])
        assert torch.equal(alone.weights[0], together.weights[row])


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), top_k=st.integers(1, 4), factor=st.floats(1, 3), seed=st.integers(0, 99))
def test_no_expert_has_more_than_its_capacity(rows: int, top_k: int, factor: float, seed: int) -> None:
    routing, scores = routed(rows, 8, top_k, seed)
    most = -int(-factor * rows * top_k // 8)
    limited = limit_load(routing, scores, most)
    ids = limited.routing.ids
    load, before = ids.flatten().bincount(minlength=8), routing.ids.flatten().bincount(minlength=8)
    assert (load - most).clamp(min=0).sum() == limited.over
    assert limited.over <= (before - most).clamp(min=0).sum() == limited.moved + limited.over
    assert (ids[:, 1:] > ids[:, :-1]).all(), "each of a token's experts once, ascending"
    torch.testing.assert_close(limited.routing.weights.sum(-1), routing.weights.sum(-1))
    untouched = (ids == routing.ids).all(-1)
    assert torch.equal(limited.routing.weights[untouched], routing.weights[untouched])


def test_what_overflows_goes_to_the_next_best() -> None:
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.9, 0.04, 0.06], [0.7, 0.1, 0.2]])
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), scores[:, :1])
    limited = limit_load(routing, scores, 1)
    assert limited.routing.ids.tolist() == [[1], [0], [2]]
    assert (limited.moved, limited.over) == (2, 0)
    torch.testing.assert_close(limited.routing.weights, scores[:, :1])  # the same sum


def test_experts_that_are_not_asked_take_no_room() -> None:
    scores = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    routing = Routing(torch.tensor([[0, 1]] * 2), scores, torch.tensor([[True, True], [True, False]]))
    limited = limit_load(routing, scores, 1)
    assert limited.routing.ids.tolist() == [[0, 1], [0, 1]]
    assert (limited.moved, limited.over) == (0, 1)  # token 0 has both experts already


def test_pairs_that_are_dropped_are_not_dispatched() -> None:
    routing, _ = routed(6, 8, 4, 0)
    adaptive = adaptive_k(routing, 0.6, 1, 4)
    assert adaptive.kept is not None
    batches = group_by_expert(torch.randn(6, 16), None, adaptive)
    assert len(batches.slots) == int(adaptive.kept.sum()) < 24
    assert sorted(batches.slots.tolist()) == adaptive.kept.flatten().nonzero().flatten().tolist()
    assert batches.offsets[-1] == len(batches.slots)


def test_an_engine_asks_fewer_experts_and_keeps_its_promise(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_qwen3_moe(tmp_path, num_experts_per_tok=4))

    def serve() -> Served:
        policy = GatePolicy(checkpoint.config, AdaptiveK(mass=0.7), None)
        return Served(checkpoint, experts=[range(6)], policy=policy)

    requests = [greedy(number, prompt(20 + 7 * number, number), 5, logprobs=1) for number in range(3)]
    alone = [serve().run(request)[request.id] for request in requests]
    served = serve()
    together = served.run(*requests)
    for request, story in zip(requests, alone, strict=True):
        assert replace(together[request.id], queue_seconds=[]) == replace(story, queue_seconds=[])
    asked = sum(len(frame.indices) for frame in served.workers[0].frames)
    dropped = sum(stats.gate_policy.get("dropped", 0) for stats in served.stats)
    rows = sum(stats.prompt_tokens + stats.generated_tokens for stats in served.stats)
    assert dropped > 0
    assert asked + dropped == 4 * 3 * sum(len(request.prompt) + 4 for request in requests), rows


def test_capacity_in_an_engine_moves_and_counts(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_qwen3_moe(tmp_path))
    served = Served(checkpoint, experts=[range(6)], policy=GatePolicy(checkpoint.config, None, 1.0))
    story = served.run(greedy(0, prompt(40, 1), 3))[0]
    assert len(story.tokens) == 3
    assert sum(stats.gate_policy.get("moved", 0) for stats in served.stats) > 0
    first = next(frame for frame in served.workers[0].frames if len(frame.indices) == 80)
    assert max(b - a for a, b in zip(first.offsets, first.offsets[1:], strict=False)) <= 14  # 40 rows x 2 of 6 experts


def test_policies_that_do_not_fit_the_model_are_named() -> None:
    with pytest.raises(ConfigError, match="min 3 and max 2"):
        GatePolicy(tiny_config(), AdaptiveK(mass=0.5, min=3), None)
    with pytest.raises(ConfigError, match="no next-best"):
        GatePolicy(tiny_config(gate=GateRule(scores="top_k_softmax")), None, 1.5)
    assert find_policy(Config().gateway, tiny_config()) is None
    assert find_policy(Config.model_validate({"gateway": {"capacity_factor": 1.5}}).gateway, tiny_config()) is not None
