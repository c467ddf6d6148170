"""The engine's time by stage: all of it, and each part where it belongs."""

from __future__ import annotations

import time

import pytest

from consilium.checkpoint import Checkpoint
from gateway.stage_clock import STAGES, StageClock
from tests.tiny_models import save_mixtral
from tests.unit.served_engine import Served, greedy, prompt


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StageClock:
    """One whose time goes on by a second at every look."""
    seconds = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    return StageClock()


def spent(clock: StageClock) -> dict[str, float]:
    return {stage: seconds for stage, seconds in clock.take().items() if seconds}


def test_every_moment_is_of_the_stage_that_ends_with_it(clock: StageClock) -> None:
    assert clock.mark("gate") == 1
    assert clock.mark("group") == 1
    clock.mark("gate")
    assert spent(clock) == {"gate": 2, "group": 1}
    assert spent(clock) == {}
    clock.start()  # nothing to do until now
    clock.mark("head")
    assert spent(clock) == {"head": 1}


@pytest.mark.parametrize(
    ("queue", "compute", "expected"),
    [
        (0.25, 1.0, {"wire": 1.75, "queue": 0.25, "compute": 1.0}),
        (1.5, 2.0, {"queue": 1.0, "compute": 2.0}),  # some of it went by before anybody waited
        (1.0, 5.0, {"compute": 3.0}),
    ],
)
def test_a_wait_is_the_workers_as_far_as_it_was_waited_for(
    clock: StageClock, queue: float, compute: float, expected: dict[str, float]
) -> None:
    waited = sum(clock.mark("wire") for _ in range(3))
    clock.waited(waited, queue, compute)
    assert spent(clock) == expected


def test_a_steps_stages_are_the_whole_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    served = Served(Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral"))))
    started = time.perf_counter()
    served.run(greedy(1, prompt(9, 1), 5))
    elapsed = time.perf_counter() - started
    stages = {stage: sum(each.stages[stage] for each in served.stats) for stage in STAGES}
    computed = {"schedule", "attention", "gate", "group", "encode", "decode", "combine", "head", "sample"}
    assert all(stages[stage] > 0 for stage in computed)
    assert all(seconds >= 0 for seconds in stages.values())
    assert sum(stages.values()) <= elapsed
