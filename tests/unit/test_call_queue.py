"""The worker's queue: who goes first, who goes together, and when there is no room."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.errors import Cancelled, DeadlineExceeded, Overloaded
from consilium.frames import Frame
from consilium.link_packets import RowFormat
from expert_service.call_queue import MOST_OVERTAKEN, CallQueue, Job


@dataclass
class Asked:
    """A call as the queue sees it: of all the protocol it looks at a few numbers."""

    number: int
    layer: int
    pairs: int
    prefill: bool
    experts: tuple[int, ...]
    nbytes: int = 1
    deadline_ms: int = 0

    def frame(self, form: RowFormat) -> Frame:
        raise NotImplementedError("a queue decodes nothing")

    def room(self, form: RowFormat) -> Tensor:
        raise NotImplementedError("a queue computes nothing")


def job(
    number: int,
    layer: int = 0,
    pairs: int = 1,
    size: int = 1,
    prefill: bool = False,
    experts: tuple[int, ...] = (0,),
) -> Job:
    return Job(Asked(number, layer, pairs, prefill, experts), size, lambda _: None)


def queue(*jobs: Job, max_calls: int = 100, max_bytes: int = 1000) -> CallQueue:
    made = CallQueue(max_calls, max_bytes)
    for each in jobs:
        made.add(each)
    return made


def ids(jobs: list[Job]) -> list[int]:
    return [each.call.number for each in jobs if isinstance(each.call, Asked)]


def rounds(waiting: CallQueue, most_pairs: int) -> list[list[int]]:
    """What is taken each time until nothing waits."""
    found = []
    while taken := waiting.take(most_pairs):
        found.append(ids(taken))
    return found


def test_an_empty_queue_gives_nothing() -> None:
    assert queue().take(10) == []


def test_single_tokens_go_before_prompts() -> None:
    waiting = queue(job(1, prefill=True), job(2), job(3, prefill=True), job(4, layer=1))
    assert rounds(waiting, 10) == [[2], [4], [1, 3]]


def test_prompts_have_their_turn() -> None:
    waiting = queue(job(0, prefill=True), job(1, layer=1, prefill=True))
    taken = []
    for number in range(2, 2 + 2 * MOST_OVERTAKEN + 2):
        waiting.add(job(number))  # there is always one that generates
        taken += ids(waiting.take(1))
    assert [taken.index(each) for each in (0, 1)] == [MOST_OVERTAKEN, 2 * MOST_OVERTAKEN + 1]


def test_prompts_that_were_not_waiting_have_not_been_overtaken() -> None:
    waiting = queue(*(job(number, layer=number) for number in range(20)))
    for _ in range(MOST_OVERTAKEN + 1):
        waiting.take(1)
    waiting.add(job(99, prefill=True))
    assert ids(waiting.take(1)) == [MOST_OVERTAKEN + 1]


def test_calls_for_one_layer_go_together_and_the_others_keep_their_order() -> None:
    waiting = queue(job(1, 5), job(2, 6), job(3, 5), job(4, 7), job(5, 6), job(6, 5))
    assert rounds(waiting, 10) == [[1, 3, 6], [2, 5], [4]]


def test_calls_that_share_no_expert_stay_apart() -> None:
    """The pieces of one frame: the first one's rows go back while the next is computed."""
    waiting = queue(*(job(number, experts=held) for number, held in enumerate([(0, 1), (2, 3), (3, 4), (0,), ()])))
    assert rounds(waiting, 10) == [[0, 3], [1, 2], [4]]


def test_together_they_have_no_more_pairs_than_a_batch() -> None:
    waiting = queue(job(1, pairs=4), job(2, pairs=5), job(3, pairs=3), job(4, pairs=1), job(5, pairs=1))
    assert rounds(waiting, 8) == [[1, 3, 4], [2, 5]]


def test_one_that_is_larger_than_a_batch_goes_alone() -> None:
    assert rounds(queue(job(1, pairs=50), job(2), job(3)), 8) == [[1], [2, 3]]


jobs_strategy = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.booleans()), max_size=40)


@given(jobs_strategy, st.integers(1, 10))
def test_every_call_is_taken_once_and_none_passes_another_of_its_layer_that_fits(
    made: list[tuple[int, int, bool]], most_pairs: int
) -> None:
    jobs = [job(number, layer, pairs, prefill=prefill) for number, (layer, pairs, prefill) in enumerate(made)]
    waiting, taken = queue(*jobs), list[int]()
    while batch := waiting.take(most_pairs):
        assert len({(each.call.layer, each.call.prefill) for each in batch}) == 1
        assert len(batch) == 1 or sum(each.call.pairs for each in batch) <= most_pairs
        assert ids(batch) == sorted(ids(batch))
        left = [each for number, each in enumerate(jobs) if number not in taken]
        same_kind = [each for each in left if each.call.prefill == batch[0].call.prefill]
        assert batch[0] is same_kind[0], "the first that waits always goes"
        taken += ids(batch)
    assert sorted(taken) == list(range(len(made)))


def test_so_many_calls_and_bytes_may_be_unfinished() -> None:
    waiting = queue(max_calls=2, max_bytes=100)
    first, second = job(1, size=60), job(2, size=40)
    waiting.add(first)
    with pytest.raises(Overloaded, match=r"1 calls of 60 bytes wait already; try again"):
        waiting.add(job(3, size=41))
    waiting.add(second)
    with pytest.raises(Overloaded, match=r"2 calls of 100 bytes"):
        waiting.add(job(3, size=0))
    taken = waiting.take(10)
    assert len(waiting) == 0
    with pytest.raises(Overloaded):  # taken, but not done
        waiting.add(job(3))
    for each in taken:
        waiting.done(each)
    waiting.add(job(3, size=100))
    assert (len(waiting), waiting.unfinished) == (1, 1)


def test_what_was_refused_takes_no_room() -> None:
    waiting = queue(max_bytes=10)
    for _ in range(3):
        with pytest.raises(Overloaded):
            waiting.add(job(1, size=11))
    assert (len(waiting), waiting.unfinished) == (0, 0)
    waiting.add(job(2, size=10))


def test_empty_is_told_at_once_or_when_the_last_call_is_done() -> None:
    told: list[str] = []
    queue().when_empty(lambda: told.append("at once"))
    assert told == ["at once"]
    waiting = queue(job(1), job(2))
    waiting.when_empty(lambda: told.append("later"))
    for each in waiting.take(10):
        assert told == ["at once"]
        waiting.done(each)
    assert told == ["at once", "later"]


def test_what_was_cancelled_comes_first_and_alone() -> None:
    jobs = [job(number) for number in range(5)]
    waiting = queue(*jobs)
    jobs[1].cancelled = jobs[3].cancelled = True
    assert waiting.take(1) == [jobs[1], jobs[3]]
    assert [waiting.take(1) for _ in range(4)] == [[jobs[0]], [jobs[2]], [jobs[4]], []]


def test_a_job_that_nobody_wants_says_so() -> None:
    wanted = job(1)
    wanted.call.deadline_ms = 60_000
    wanted.check()
    wanted.received -= 61
    with pytest.raises(DeadlineExceeded, match="its 60000 ms"):
        wanted.check()
    wanted.cancelled = True
    with pytest.raises(Cancelled):
        wanted.check()
