"""One batch or two: decided by what was measured, predicted before it is tried, and measured again later."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.messages import EngineStats, WorkerStats
from gateway.micro_batches import REPEAT, TRIAL, LayerCost, MicroBatches, alternating, share_out
from gateway.stage_clock import STAGES

LAYERS, MS = 10, 1e-3
ROWS = 16


def stats(own: float, way: float, experts: float, waited: float) -> EngineStats:
    """A step with these times of a layer and frame in ms, of which the engine's thread waited ``waited`` a layer."""
    stages = dict.fromkeys(STAGES, 0.0)
    stages |= {"attention": own * LAYERS * MS, "wire": waited * LAYERS * MS}
    busy, idle = (
        WorkerStats(
            "experts", str(each), frames=LAYERS, compute_seconds=each * LAYERS * MS, wire_seconds=way * LAYERS * MS
        )
        for each in (experts, experts / 2)
    )
    return EngineStats(1, 0, 0, 1, workers=[busy, idle], stages=stages)


def run(decide: MicroBatches, steps: int, step: Callable[[int], EngineStats], *, same_host: bool = False) -> list[int]:
    """What was chosen at each of so many steps, each of which took what ``step`` says of it."""
    chosen = []
    for _ in range(steps):
        count = decide.choose(ROWS, ROWS, same_host=same_host)
        decide.learn(ROWS, count, step(count))
        chosen.append(count)
    return chosen


def decide(fixed: int | None = None) -> MicroBatches:
    return MicroBatches(LAYERS, top_k=8, num_experts=64, fixed=fixed)


def test_a_long_way_is_hidden() -> None:
    """1 ms of the engine's, 4 of the way, 2 of the experts; half the rows still need 1, 4 and 1.5."""

    def step(count: int) -> EngineStats:
        return stats(1, 4, 2, 6) if count == 1 else stats(2, 4, 1.5, 4.5)

    decides = decide()
    chosen = run(decides, 3 * REPEAT, step)
    assert chosen[:TRIAL] == [1] * TRIAL
    assert set(chosen[TRIAL:REPEAT]) == {2}
    assert chosen.count(1) <= 4 * TRIAL  # measured again now and then
    hop, rereading = decides.weighed(ROWS)
    assert hop == pytest.approx(4 * MS)
    assert rereading == pytest.approx((2 * (1 + 1.5) - (1 + 2)) * MS)


def test_a_short_way_is_not_worth_reading_twice() -> None:
    assert set(run(decide(), REPEAT, lambda _: stats(2, 0.2, 4, 4.2))) == {1}


def test_cores_that_are_shared_hide_nothing() -> None:
    def step(_: int) -> EngineStats:
        return stats(2, 1, 3, 4)

    assert 2 in run(decide(), REPEAT, step)  # it was worth trying
    assert set(run(decide(), REPEAT, step, same_host=True)) == {1}


def test_a_prediction_that_was_wrong_is_not_kept() -> None:
    def step(count: int) -> EngineStats:
        return stats(1, 4, 2, 6) if count == 1 else stats(3, 4, 2, 6)

    chosen = run(decide(), REPEAT, step)
    assert chosen.count(2) == TRIAL
    assert set(chosen[2 * TRIAL :]) == {1}


def test_it_follows_a_way_that_becomes_longer() -> None:
    now = 0

    def step(count: int) -> EngineStats:
        nonlocal now
        now += 1
        way = 0.1 if now < REPEAT else 8
        return stats(1, way, 2, 2 + way) if count == 1 else stats(2, way, 1.5, way)

    chosen = run(decide(), 2 * REPEAT, step)
    assert set(chosen[: REPEAT // 2]) == {1}
    assert set(chosen[-REPEAT // 4 :]) == {2}


@pytest.mark.parametrize("fixed", [1, 2])
def test_the_configuration_stands(fixed: int) -> None:
    assert set(run(decide(fixed), 20, lambda _: stats(1, 4, 2, 6))) == {fixed}


def test_one_sequence_is_one_batch() -> None:
    assert decide(2).choose(512, 1, same_host=False) == 1
    assert MicroBatches(0, 0, 0, 2).choose(16, 16, same_host=False) == 1  # no layer routes


def test_steps_without_workers_teach_nothing() -> None:
    decides = decide()
    decides.learn(ROWS, 1, EngineStats(1, 0, 0, 1, stages=dict.fromkeys(STAGES, 1.0)))
    assert decides.weighed(ROWS) == (0.0, 0.0)


def test_who_is_busiest_decides() -> None:
    assert alternating(LayerCost(1, 4, 2), same_host=False) == 7
    assert alternating(LayerCost(1, 0.5, 3), same_host=False) == 6
    assert alternating(LayerCost(1, 0.5, 3), same_host=True) == 8


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([1, 1, 1, 1], [[0, 2], [1, 3]]),
        ([1, 1, 1], [[0, 2], [1]]),
        ([100, 1, 1], [[0], [1, 2]]),
        ([1, 50, 49, 1], [[1, 3], [0, 2]]),
    ],
)
def test_parts_have_about_as_many_rows(lengths: list[int], expected: list[list[int]]) -> None:
    assert share_out(lengths, 2) == expected
