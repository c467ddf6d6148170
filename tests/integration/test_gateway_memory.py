"""The gateway reads no expert: ten times as many of them change its memory by next to nothing."""

from __future__ import annotations

from pathlib import Path

from tests.memory import stack_memory
from tests.random_checkpoint import save_random_mixtral
from tests.stack import stack

FEW, MANY = 4, 40


def test_resident_memory_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    sizes = {experts: save_random_mixtral(tmp_path / str(experts), experts) for experts in (FEW, MANY)}
    taken = {}
    for experts in sizes:
        with stack(tmp_path / str(experts)) as served:
            taken[experts] = stack_memory(served)
    added = sizes[MANY] - sizes[FEW]
    growth = {part: taken[MANY][part] - taken[FEW][part] for part in taken[MANY]}
    assert added >= 200e6
    assert growth["workers"] > added / 2, f"the workers hold the experts: {taken}"
    assert growth["engine"] < added / 10, taken
    assert growth["http"] < added / 10, taken
