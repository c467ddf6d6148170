"""The scheduler by itself: who runs, in what order, and what happens when memory is short."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.kv_cache import BLOCK, KVPool
from gateway.kv_store import KVStore
from gateway.messages import Generate, SamplingParams
from gateway.scheduler import Scheduler
from gateway.sequence import Sequence
from tests.unit.model_configs import tiny_config

CONFIG = tiny_config()
BYTES_PER_BLOCK = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * BLOCK


def scheduler(blocks: int, running: int = 8, step: int = 64) -> Scheduler:
    return Scheduler(KVStore(KVPool(CONFIG, torch.float32, blocks * BYTES_PER_BLOCK)), running, step)


def sequence(number: int, prompt: int, new: int) -> Sequence:
    return Sequence.start(Generate(number, [number] * prompt, SamplingParams(max_tokens=new)))


def compute(queue: Scheduler) -> list[tuple[int, int]]:
    """One step: everything scheduled is computed, complete sequences get a token. Returns (id, length)."""
    work = queue.schedule()
    for each in work:
        each.sequence.computed += each.length
        if not each.sequence.uncomputed:
            each.sequence.append(3, ())
    return [(each.sequence.id, each.length) for each in work]


def test_prompts_run_in_chunks_behind_generating_sequences() -> None:
    queue = scheduler(blocks=100, step=10)
    queue.add(sequence(1, prompt=4, new=5))
    queue.add(sequence(2, prompt=25, new=5))
    assert compute(queue) == [(1, 4), (2, 6)]
    assert compute(queue) == [(1, 1), (2, 9)]
    assert compute(queue) == [(1, 1), (2, 9)]
    assert compute(queue) == [(1, 1), (2, 1)]
    assert compute(queue) == [(1, 1), (2, 1)]


def test_no_more_run_than_allowed() -> None:
    queue = scheduler(blocks=100, running=2)
    for number in range(4):
        queue.add(sequence(number, prompt=3, new=1))
    assert [number for number, _ in compute(queue)] == [0, 1]
    assert {each.id for each in queue.reap()} == {0, 1}
    assert [number for number, _ in compute(queue)] == [2, 3]


def test_a_budget_below_their_number_goes_round() -> None:
    queue = scheduler(blocks=100, running=4, step=2)
    for number in range(4):
        queue.add(sequence(number, prompt=1, new=50))
    for _ in range(8):
        compute(queue)
    generated = [each.generated for each in queue.running]
    assert max(generated) - min(generated) <= 1


def test_waits_for_room_and_takes_it_when_freed() -> None:
    queue = scheduler(blocks=3)
    queue.add(sequence(1, prompt=2 * BLOCK - 1, new=1))
    queue.add(sequence(2, prompt=2 * BLOCK - 1, new=1))
    assert compute(queue) == [(1, 2 * BLOCK - 1)]
    queue.reap()
    assert compute(queue) == [(2, 2 * BLOCK - 1)]
    queue.reap()
    assert queue.store.used_tokens == 0


def test_what_can_never_fit_fails_at_once() -> None:
    queue = scheduler(blocks=2)
    queue.add(sequence(1, prompt=BLOCK, new=BLOCK + 1))
    (ended,) = queue.reap()
    assert ended.failure is not None
    assert "kv_cache_memory" in ended.failure.message


def test_the_last_one_gives_way_and_is_computed_again() -> None:
    queue = scheduler(blocks=3)
    first, second = sequence(1, prompt=BLOCK - 1, new=2 * BLOCK), sequence(2, prompt=BLOCK - 1, new=2 * BLOCK)
    queue.add(first)
    queue.add(second)
    preempted = 0
    for _ in range(6 * BLOCK):
        compute(queue)
        preempted += queue.take_preemptions()
        queue.reap()
    assert preempted >= 1
    assert first.finish_reason == second.finish_reason == "length"
    assert first.generated == second.generated == 2 * BLOCK
    assert queue.store.used_tokens == 0


@pytest.mark.parametrize("running", [True, False])
def test_an_aborted_sequence_frees_its_room(running: bool) -> None:
    queue = scheduler(blocks=4)
    queue.add(sequence(1, prompt=20, new=5))
    if running:
        compute(queue)
    queue.abort(1)
    assert [each.finish_reason for each in queue.reap()] == ["abort"]
    assert queue.store.used_tokens == 0
    assert not queue.running
    assert not queue.waiting


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=12),
    st.integers(4, 12),
    st.integers(1, 5),
    st.integers(1, 50),
)
def test_everything_ends_and_nothing_leaks(
    lengths: list[tuple[int, int]], blocks: int, running: int, step: int
) -> None:
    queue = scheduler(blocks, running, step)
    for number, (prompt, new) in enumerate(lengths):
        queue.add(sequence(number, prompt, new))
    ended: list[Sequence] = queue.reap()
    for _ in range(5000):
        for each in queue.schedule():
            each.sequence.computed += each.length
            assert each.sequence.cache is not None
            assert each.sequence.computed <= each.sequence.cache.committed
            if not each.sequence.uncomputed:
                if each.sequence.sampling.max_tokens:
                    each.sequence.append(3, ())
                else:
                    each.sequence.finish_reason = "length"
        ended += queue.reap()
        assert 0 <= queue.store.free_blocks <= queue.store.pool.total_blocks
        if len(ended) == len(lengths):
            break
    assert len(ended) == len(lengths)
    assert queue.store.used_tokens == 0
