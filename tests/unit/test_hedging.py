"""When a frame counts as late, and how often others are asked; and the dispatcher over workers that are late."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from consilium.checkpoint import Checkpoint
from consilium.config import GatewayConfig
from consilium.errors import ExpertUnavailable
from consilium.frames import Frame
from gateway.dispatcher import Dispatcher
from gateway.hedging import BURST, LEARNT, SHARE, STEP, HedgeBudget, RetryBudget, RowTimes
from gateway.mailbox import Completion, FirstOf, Mailbox
from tests.local_workers import LocalWorker, local_dispatcher
from tests.tiny_models import save_mixtral
from tests.unit.test_dispatcher import dispatched, expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(lambda event: pytest.fail(f"unexpected {event}"))


def test_the_limit_is_passed_by_one_frame_in_twenty_and_follows() -> None:
    times, chance = RowTimes(), random.Random(4)
    for scale in (0.01, 1.0, 0.1):
        for _ in range(2000):
            times.add(8, scale * chance.expovariate(1))
        passed = 0
        for _ in range(4000):
            seconds, limit = scale * chance.expovariate(1), times.limit(8)
            assert limit is not None
            passed += seconds > limit
            times.add(8, seconds)
        assert 0.03 < passed / 4000 < 0.07


def test_what_was_given_up_says_something_only_where_it_was_late() -> None:
    times = RowTimes()
    times.not_within(8, 5)  # nothing is known
    for _ in range(LEARNT):
        times.add(8, 0.1)
    times.not_within(8, 0.05)
    assert times.limit(8) == 0.1
    times.not_within(8, 0.2)
    assert times.limit(8) == pytest.approx(0.1 * (1 + STEP * SHARE))


def test_sizes_are_apart_and_a_few_frames_say_nothing() -> None:
    times = RowTimes()
    for _ in range(LEARNT - 1):
        times.add(8, 0.1)
    assert times.limit(8) is None
    times.add(15, 0.3)
    assert times.limit(8) == 0.3
    assert times.limit(16) is None


def test_hedges_are_a_share_of_the_frames() -> None:
    budget, spent = HedgeBudget(0.05), 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 50 <= spent <= 50 + BURST
    assert not HedgeBudget(0).spend()


def test_retries_are_a_share_of_what_is_in_flight_or_a_few() -> None:
    budget = RetryBudget()
    budget.active, budget.retries = 5, RetryBudget.LEAST - 1
    assert budget.admits()
    budget.retries += 1
    assert not budget.admits()
    budget.active = 100
    assert budget.admits()
    budget.retries = 20
    assert not budget.admits()


def test_several_completions_are_awaited_at_once(mailbox: Mailbox) -> None:
    gone: list[float] = []
    calls: list[Completion[int]] = [Completion(each, partial(gone.append, each)) for each in (1e12, 0, 1e12)]

    async def wait(wake: float) -> None:
        await FirstOf(calls, wake)

    mailbox.drive(wait(1e12))  # the second one's time has come
    assert (gone, calls[0].outcome, isinstance(calls[1].outcome, Exception)) == ([0], None, True)
    del calls[1]
    mailbox.drive(wait(0))
    assert [each.outcome for each in calls] == [None, None]
    mailbox.settle(calls[1], 7)
    mailbox.drive(wait(1e12))
    assert calls[1].outcome == 7


class TwoReplicas:
    """Both hold everything; the first is asked first, and both have answered often enough."""

    def __init__(self, checkpoint: Checkpoint, mailbox: Mailbox, **settings: float) -> None:
        config = GatewayConfig(layer_timeout=10, audit=0, **settings)
        self.mailbox = mailbox
        self.dispatcher: Dispatcher
        self.dispatcher, workers = local_dispatcher(checkpoint, mailbox, [range(4), range(4)], config=config)
        self.first: LocalWorker = workers[0]
        self.second: LocalWorker = workers[1]
        for _ in range(2 * LEARNT):
            dispatched(self.dispatcher, mailbox)
        self.prefer(self.first)

    def prefer(self, worker: LocalWorker) -> None:
        for place, address in enumerate(self.dispatcher.crew.fleet.index):
            self.dispatcher.crew.fleet.work[place] = 0 if address == worker.address else 1000

    def take(self, what: str) -> list[int]:
        stats = {each.address: each for each in self.dispatcher.take_stats()}
        return [
            getattr(stats[each.address], what) if each.address in stats else 0 for each in (self.first, self.second)
        ]


def test_what_is_late_is_had_elsewhere_and_the_late_one_is_left_alone_until_it_answers(
    checkpoint: Checkpoint, mailbox: Mailbox
) -> None:
    two = TwoReplicas(checkpoint, mailbox)
    two.dispatcher.take_stats()
    two.first.silent, asked, released = True, len(two.first.frames), two.first.released
    found, failures = dispatched(two.dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    assert len(two.first.frames) == asked + 1
    stats = {each.address: each for each in two.dispatcher.take_stats()}
    assert (stats[two.first.address].late, stats[two.second.address].hedges) == (1, 1)
    assert (two.first.withdrawn, two.second.withdrawn) == (1, 0)
    for _ in range(3):
        two.prefer(two.first)
        dispatched(two.dispatcher, mailbox)
    assert len(two.first.frames) == asked + 1
    two.first.wake()
    while mailbox.receive(0):
        pass
    assert two.first.released == released + 1
    two.prefer(two.first)
    dispatched(two.dispatcher, mailbox)
    assert len(two.first.frames) == asked + 2


def test_without_a_budget_only_what_hangs_is_had_elsewhere(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    two = TwoReplicas(checkpoint, mailbox, hedging=0)
    two.first.silent = True
    _, failures = dispatched(two.dispatcher, mailbox)  # after ten times the limit
    assert not failures
    assert two.take("late") == [1, 0]


def test_whoever_is_asked_twice_may_fail_once(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    two = TwoReplicas(checkpoint, mailbox)
    two.first.silent = True

    def fail(_: Frame) -> Exception:
        mailbox.post(lambda: mailbox.post(two.first.wake))  # after the failure has been seen
        return ExpertUnavailable("gone")

    two.second.misbehave = fail
    found, failures = dispatched(two.dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    assert two.take("failures") == [0, 1]


def test_a_late_frame_that_is_never_answered_is_given_up_in_time(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    two = TwoReplicas(checkpoint, mailbox)
    two.first.silent = True
    object.__setattr__(two.first, "time_limit", lambda _: 0.2)
    dispatched(two.dispatcher, mailbox)
    assert not mailbox.receive(0.25)  # its time passes
    dispatched(two.dispatcher, mailbox)
    assert two.take("failures") == [1, 0]
    two.first.wake()
    while mailbox.receive(0):
        pass


def test_rows_that_are_no_numbers_are_had_elsewhere(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    two = TwoReplicas(checkpoint, mailbox)
    two.first.spoil = lambda rows: rows.index_fill(0, torch.tensor([len(rows) - 1]), float("nan"))
    found, failures = dispatched(two.dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    assert list(two.dispatcher.crew.out()) == [two.first.address]


def test_rows_that_are_no_numbers_for_anybody_are_the_models(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    two = TwoReplicas(checkpoint, mailbox)
    two.first.spoil = two.second.spoil = lambda rows: rows * float("nan")
    found, failures = dispatched(two.dispatcher, mailbox)
    assert found.isnan().all()
    assert not failures
    assert two.dispatcher.crew.out() == {}


def test_nothing_is_planned_twice_where_there_is_one_holder(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 1], [2, 3]])
    for _ in range(3 * LEARNT):
        dispatched(dispatcher, mailbox)
    assert not dispatcher.crew.fleet.work.any()
    assert {len(worker.frames) for worker in workers} == {3 * LEARNT}
