"""Who is left alone, for how long, and how it comes back."""

from __future__ import annotations

import pytest

from consilium.checkpoint import Checkpoint
from consilium.config import GatewayConfig
from consilium.errors import ExpertUnavailable, Overloaded, WireError
from gateway.ejection import FAILURES, MOST_TIMES, PROBES, Ejections
from gateway.mailbox import Mailbox
from tests.local_workers import local_dispatcher
from tests.tiny_models import save_mixtral
from tests.unit.test_dispatcher import dispatched


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(ejections: Ejections, address: str, times: int = FAILURES, group: int = 4) -> bool:
    """Whether the last of so many failures ejected it."""
    return [ejections.failed(address, group, len(ejections.out)) for _ in range(times)][-1]


def come_back(ejections: Ejections, address: str) -> None:
    for _ in range(PROBES):
        assert ejections.wants_probe(address)
        ejections.probing(address)
        assert not ejections.wants_probe(address)
        ejections.probed(address, good=True)


def test_failures_in_a_row_eject(clock: Clock) -> None:
    ejections = Ejections(10, clock)
    assert not fail(ejections, "a", FAILURES - 1)
    ejections.answered("a")
    assert not fail(ejections, "a", FAILURES - 1)
    assert fail(ejections, "a", 1)
    assert ejections.out == ["a"]


def test_it_is_tried_after_a_time_that_grows_and_shrinks(clock: Clock) -> None:
    ejections = Ejections(10, clock)
    for times in (1, 2, 3):
        assert fail(ejections, "a")
        clock.now += 10 * times - 1
        assert not ejections.wants_probe("a")
        clock.now += 1
        come_back(ejections, "a")
        assert ejections.out == []
    clock.now += 20  # well for two ejection times
    assert fail(ejections, "a")
    clock.now += 20
    assert ejections.wants_probe("a")
    for times in range(3, 3 * MOST_TIMES):  # a bad probe ejects it again, for longer, up to a limit
        ejections.probing("a")
        assert not ejections.probed("a", good=False)
        clock.now += 10 * min(times, MOST_TIMES) - 1
        assert not ejections.wants_probe("a")
        clock.now += 1
        assert ejections.wants_probe("a")


def test_never_more_than_a_share_of_the_group(clock: Clock) -> None:
    ejections = Ejections(10, clock)
    assert fail(ejections, "a")
    assert fail(ejections, "b")
    assert not fail(ejections, "c")
    ejections.forget("a")
    assert fail(ejections, "c", 1)
    alone = Ejections(10, clock)
    assert fail(alone, "a", group=1)  # one always may: what nobody else holds it is asked for all the same


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


def test_the_dispatcher_leaves_it_alone_probes_it_and_takes_it_back(checkpoint: Checkpoint) -> None:
    mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
    config = GatewayConfig(layer_timeout=10, audit=0, ejection_time=1000)
    dispatcher, (bad, good) = local_dispatcher(checkpoint, mailbox, [range(4), range(4)], config=config)
    clock, changes = Clock(), list[dict[str, str]]()
    dispatcher.crew.probation.ejections = Ejections(10, clock)
    dispatcher.crew.on_change = lambda: changes.append(dispatcher.crew.out())
    bad.misbehave = lambda _: WireError("garbage")
    for _ in range(4 * FAILURES):
        _, failures = dispatched(dispatcher, mailbox)
        assert not failures
    assert [list(each) for each in changes] == [[bad.address]]
    assert len(bad.frames) == FAILURES
    good.misbehave = lambda _: ExpertUnavailable("gone")
    _, failures = dispatched(dispatcher, mailbox)  # nobody else is left: it is asked all the same
    assert failures
    assert len(bad.frames) == FAILURES + 1
    good.misbehave = bad.misbehave = lambda _: None
    asked = len(bad.frames)
    dispatched(dispatcher, mailbox)
    assert len(bad.frames) == asked
    clock.now += 10
    for _ in range(PROBES + 1):
        _, failures = dispatched(dispatcher, mailbox)
        assert not failures
        while mailbox.receive(0):
            pass
    assert [len(each.experts) for each in bad.frames[asked : asked + PROBES]] == [1] * PROBES
    assert changes[-1] == {}
    for _ in range(4):
        dispatched(dispatcher, mailbox)
    assert len(bad.frames) > asked + PROBES
    assert sum(each.ejections for each in dispatcher.take_stats()) == 1


def test_who_has_too_much_to_do_is_not_ejected_for_it(checkpoint: Checkpoint) -> None:
    mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
    dispatcher, (busy, _) = local_dispatcher(checkpoint, mailbox, [range(4), range(4)])
    busy.misbehave = lambda _: Overloaded("full")
    for _ in range(4 * FAILURES):
        dispatched(dispatcher, mailbox)
    assert dispatcher.crew.out() == {}
