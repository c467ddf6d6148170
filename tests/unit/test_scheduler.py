"""The scheduler by itself: who runs, in what order, and what happens when memory is short."""

from __future__ import annotations

import pytest
import torch

from gateway.kv_cache import BLOCK, KVPool
from gateway.kv_store import KVStore
from gateway.messages import Caller, Generate, SamplingParams
from gateway.scheduler import Scheduler
from gateway.sequence import Sequence
from tests.unit.model_configs import tiny_config

CONFIG = tiny_config()
BYTES_PER_BLOCK = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * BLOCK


def scheduler(blocks: int, running: int = 8, step: int = 64, *, prefix_cache: bool = True) -> Scheduler:
    pool = KVPool(CONFIG, torch.float32, blocks * BYTES_PER_BLOCK)
    return Scheduler(KVStore(pool, prefix_cache=prefix_cache), running, step)


def sequence(number: int, prompt: int, new: int, *, priority: int = 0, user: str = "") -> Sequence:
    """Sequences with different numbers have nothing in common."""
    caller = Caller(user=user, priority=priority)
    return Sequence.start(Generate(number, [number] * prompt, SamplingParams(max_tokens=new), caller=caller))


def compute(queue: Scheduler) -> list[tuple[int, int]]:
    """One step: everything scheduled is computed, complete sequences get a token. Returns (id, length)."""
    work = queue.schedule()
    for each in work:
        each.sequence.computed += each.length
        if not each.sequence.uncomputed:
            each.sequence.append(3, ())
    return [(each.sequence.id, each.length) for each in work]


def ids(work: list[tuple[int, int]]) -> list[int]:
    return [number for number, _ in work]


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


def test_short_prompts_pass_a_long_one_that_goes_on_all_the_same() -> None:
    queue = scheduler(blocks=500, running=4, step=20)
    queue.add(sequence(1, prompt=400, new=1))
    queue.add(sequence(2, prompt=400, new=1))
    compute(queue)
    for number in range(10, 30):
        queue.add(sequence(number, prompt=10, new=1))
        work = dict(compute(queue))
        assert work[1] == 10
        assert work[number] == 10  # though two long ones are before it
        queue.reap()
    assert queue.running[0].computed == 10 + 20 * 10


def test_a_long_prompt_is_overtaken_by_short_ones_only_so_often() -> None:
    queue = scheduler(blocks=40, running=8)
    queue.add(sequence(0, prompt=10, new=10 * BLOCK))
    compute(queue)
    queue.add(sequence(1, prompt=39 * BLOCK, new=1))  # no room for it as long as any other runs
    compute(queue)
    admitted: list[int] = []
    for number in range(2, 500):
        queue.add(sequence(number, prompt=10, new=3))
        admitted += [each for each, length in compute(queue) if length > 1]
        queue.reap()
    assert admitted.index(1) == 32
    assert admitted[-1] > 400, "nor does it stop the others for ever"


def test_a_client_with_one_request_does_not_wait_for_another_ones_hundred() -> None:
    queue = scheduler(blocks=500, running=2)
    for number in range(100):
        queue.add(sequence(number, prompt=5, new=2, user="greedy"))
    compute(queue)
    queue.add(sequence(100, prompt=5, new=2, user="modest"))
    compute(queue)
    queue.reap()
    assert set(ids(compute(queue))) == {2, 100}


def test_clients_that_always_wait_are_served_alike_whatever_they_send() -> None:
    queue = scheduler(blocks=2000, running=4, step=64)
    kinds = {"long": (200, 3), "short": (4, 3), "chatty": (4, 60)}
    served = dict.fromkeys(kinds, 0)
    number = 0
    for _ in range(3000):
        for user, (prompt, new) in kinds.items():
            while sum(each.client.user == user for each in queue.waiting) < 8:
                queue.add(sequence(number, prompt, new, user=user))
                number += 1
        for each in queue.schedule():
            served[each.sequence.client.user] += each.length * (2 if each.sequence.generated else 1)
            each.sequence.computed += each.length
            if not each.sequence.uncomputed:
                each.sequence.append(3, ())
        queue.reap()
    assert min(served.values()) > 10_000
    assert max(served.values()) - min(served.values()) < 1000, served


def test_the_urgent_come_first_and_ties_are_by_arrival() -> None:
    queue = scheduler(blocks=100, running=1)
    for number, priority in enumerate([5, 0, -2, 0, 5]):
        queue.add(sequence(number, prompt=4, new=1, priority=priority))
    order = []
    for _ in range(5):
        order += ids(compute(queue))
        queue.reap()
    assert order == [2, 1, 3, 0, 4]


@pytest.mark.parametrize("scarce", ["memory", "places"])
def test_the_urgent_make_others_give_way(scarce: str) -> None:
    queue = scheduler(blocks=6 if scarce == "memory" else 100, running=8 if scarce == "memory" else 2)
    queue.add(sequence(1, prompt=2 * BLOCK, new=BLOCK, priority=1))
    queue.add(sequence(2, prompt=2 * BLOCK, new=BLOCK, priority=1))
    assert ids(compute(queue)) == [1, 2]
    queue.add(sequence(3, prompt=2 * BLOCK, new=BLOCK))
    assert set(ids(compute(queue))) == {1, 3}
    assert queue.take_preemptions() == 1
    queue.add(sequence(4, prompt=2 * BLOCK, new=BLOCK, priority=1))
    assert set(ids(compute(queue))) == {1, 3}, "the equally urgent make nobody give way"


def test_who_gave_way_goes_on_where_it_was() -> None:
    queue = scheduler(blocks=100, running=1)
    queue.add(sequence(1, prompt=5 * BLOCK, new=BLOCK, priority=1))
    for _ in range(4):
        compute(queue)
    queue.add(sequence(2, prompt=BLOCK, new=1))
    assert compute(queue) == [(2, BLOCK)]
    queue.reap()
    assert compute(queue) == [(1, 1)]
    assert queue.store.take_queries() == (6 * BLOCK, 0)  # that is no hit of its prompt


def test_the_choices_of_a_prompt_compute_it_once() -> None:
    queue = scheduler(blocks=500, running=8, step=40)
    for number in range(5):
        queue.add(Sequence.start(Generate(number, [7] * 100, SamplingParams(4), choice=number)))
    assert compute(queue) == [(0, 40)]
    assert compute(queue) == [(0, 40)]
    assert compute(queue) == [(0, 20)]
    assert compute(queue) == [(number, 1) for number in range(5)]
    assert queue.store.take_queries() == (500, 4 * 99)


def test_nothing_is_reused_across_other_weights() -> None:
    queue = scheduler(blocks=500)
    for number, cached in enumerate([0, 49, 0, 49]):
        queue.add(Sequence.start(Generate(number, [7] * 50, SamplingParams(2))))
        compute(queue)
        if number == 1:
            queue.forget_prefixes()  # while it runs
        compute(queue)
        assert [each.cached_tokens for each in queue.reap()] == [cached]


def test_many_that_wait_for_one_prefix_hold_up_nobody_else() -> None:
    queue = scheduler(blocks=2000, running=64, step=64)
    for number in range(40):  # the same prompt forty times, longer than many steps
        queue.add(Sequence.start(Generate(number, [7] * 1500, SamplingParams(max_tokens=3))))
    compute(queue)
    queue.add(sequence(99, prompt=8, new=3))
    assert 99 in ids(compute(queue))
