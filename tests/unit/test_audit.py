"""Workers that answer with well-formed wrong numbers are found, and their answers are not used."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.config import GatewayConfig
from consilium.errors import CheckpointError, ExpertUnavailable
from gateway.dispatcher import Dispatcher
from gateway.local_experts import LocalExperts
from gateway.mailbox import Mailbox
from gateway.placement import build_placement
from tests.local_workers import LocalWorker, local_dispatcher
from tests.tiny_models import save_mixtral
from tests.unit.test_dispatcher import TOKENS, dispatched, expected

EVERY = GatewayConfig(layer_timeout=10, audit=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(lambda event: pytest.fail(f"unexpected {event}"))


def audited(checkpoint: Checkpoint, mailbox: Mailbox, workers: int) -> tuple[Dispatcher, list[LocalWorker]]:
    """Full replicas of which every frame is compared; they compute as this process would."""
    dispatcher, replicas = local_dispatcher(checkpoint, mailbox, [range(4)] * workers, config=EVERY)
    local: LocalExperts = dispatcher.crew.local()
    for worker in replicas:
        worker.compute, worker.numerics_class = local.rows, local.numerics_class
    follow(dispatcher, replicas)
    return dispatcher, replicas


def lie(rows: Tensor) -> Tensor:
    """One bit of one number."""
    bits = rows.contiguous().view(torch.int32).clone()
    bits[-1, 3] ^= 1
    return bits.view(rows.dtype)


def unable(message: str) -> LocalExperts:
    raise CheckpointError(message)


def lies(dispatcher: Dispatcher, workers: list[LocalWorker]) -> list[int]:
    stats = {each.address: each for each in dispatcher.take_stats()}
    return [stats[worker.address].lies if worker.address in stats else 0 for worker in workers]


def test_equal_answers_are_used_and_both_are_released(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    assert [len(worker.frames) for worker in workers] == [1, 1]
    assert sum(each.audits for each in dispatcher.take_stats()) == 1


@pytest.mark.parametrize("liar", [0, 1])
def test_the_checkpoint_says_who_lies(checkpoint: Checkpoint, mailbox: Mailbox, liar: int) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    right, _ = dispatched(dispatcher, mailbox)
    told: list[str] = []
    dispatcher.crew.on_liar = lambda: told.append("liar")
    workers[liar].spoil = lie
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.equal(found, right)
    assert not failures
    assert list(dispatcher.crew.out()) == [workers[liar].address]
    assert told == ["liar"]
    assert lies(dispatcher, workers)[liar] == 1
    asked = len(workers[liar].frames)
    dispatched(dispatcher, mailbox)
    # The same process again, after its connection was lost for a while: it stays out.
    follow(dispatcher, workers)
    found, _ = dispatched(dispatcher, mailbox)
    assert torch.equal(found, right)
    assert len(workers[liar].frames) == asked
    workers[liar].identity, workers[liar].spoil = "2", lambda rows: rows
    follow(dispatcher, workers)
    dispatched(dispatcher, mailbox)
    assert len(workers[liar].frames) == asked + 1


def follow(dispatcher: Dispatcher, workers: list[LocalWorker]) -> None:
    held = {worker.address: [(1, expert) for expert in range(4)] for worker in workers}
    dispatcher.follow(build_placement(held), {worker.address: worker for worker in workers})


@pytest.mark.parametrize("liar", [0, 1, 2])
def test_without_the_checkpoint_a_third_worker_says_it(checkpoint: Checkpoint, mailbox: Mailbox, liar: int) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 3)
    right, _ = dispatched(dispatcher, mailbox)
    dispatcher.crew.local = partial(unable, "the gateway has no experts")
    workers[liar].spoil = lie
    for _ in range(20):
        found, failures = dispatched(dispatcher, mailbox)
        assert torch.equal(found, right)
        assert not failures
    assert list(dispatcher.crew.out()) == [workers[liar].address]


def test_where_nobody_can_say_it_the_rows_fail(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    dispatcher.crew.local = partial(unable, "the gateway has no experts")
    workers[0].spoil = lie
    _, failures = dispatched(dispatcher, mailbox)
    assert len(failures) == TOKENS
    assert "answer differently" in str(failures[0])
    assert dispatcher.crew.out() == {}


def test_a_second_worker_that_fails_or_rounds_otherwise_changes_nothing(
    checkpoint: Checkpoint, mailbox: Mailbox
) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    right, _ = dispatched(dispatcher, mailbox)
    for worker in workers:
        worker.misbehave = lambda _: ExpertUnavailable("gone")
        found, failures = dispatched(dispatcher, mailbox)
        assert torch.equal(found, right)
        assert not failures
        worker.misbehave = lambda _: None
    workers[0].spoil, workers[0].numerics_class = lie, "another"
    follow(dispatcher, workers)
    asked = sum(len(worker.frames) for worker in workers)
    dispatched(dispatcher, mailbox)
    assert sum(len(worker.frames) for worker in workers) == asked + 1


@pytest.mark.parametrize("checked", [True, False], ids=["with the checkpoint", "without it"])
def test_a_lone_answer_that_is_no_number_is_not_believed_where_the_checkpoint_knows_better(
    checkpoint: Checkpoint, mailbox: Mailbox, checked: bool
) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    right, _ = dispatched(dispatcher, mailbox)
    if not checked:
        dispatcher.crew.local = partial(unable, "the gateway has no experts")
    workers[0].spoil = lambda rows: rows * float("nan")
    workers[1].misbehave = lambda _: ExpertUnavailable("gone")
    found, failures = dispatched(dispatcher, mailbox)
    assert not failures
    assert torch.equal(found, right) if checked else found.isnan().all()  # else it may be the model
    assert list(dispatcher.crew.out()) == [workers[0].address] * checked


def test_a_second_worker_that_does_not_answer_is_waited_for_only_so_long(
    checkpoint: Checkpoint, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.layer_audits.PATIENCE", 0.05)
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    right, _ = dispatched(dispatcher, mailbox)
    for worker in workers:
        worker.silent = True
        found, failures = dispatched(dispatcher, mailbox)
        assert torch.equal(found, right)
        assert not failures
        worker.wake()
        while mailbox.receive(0):
            pass


@pytest.mark.parametrize("at_once", [True, False], ids=["answers at once", "answers one by one"])
@pytest.mark.parametrize("checked", [True, False], ids=["with the checkpoint", "without it"])
def test_a_liar_that_is_in_several_frames_of_one_layer(
    checkpoint: Checkpoint, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch, at_once: bool, checked: bool
) -> None:
    experts = [[0, 1], [2, 3], range(4), range(4)] if checked else [[0, 1], [2, 3], *[range(4)] * 3]
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, experts, config=EVERY)
    local = dispatcher.crew.local()
    for worker in workers:
        worker.compute, worker.numerics_class = local.rows, local.numerics_class
    held = {each.address: [(1, expert) for expert in set_] for each, set_ in zip(workers, experts, strict=True)}
    dispatcher.follow(build_placement(held), {each.address: each for each in workers})
    right, _ = dispatched(dispatcher, mailbox)
    if at_once:
        monkeypatch.setattr(mailbox, "settle", lambda completion, outcome: completion.settle(outcome))
    if not checked:
        dispatcher.crew.local = partial(unable, "the gateway has no experts")
    for _ in range(20):
        for liar in workers:
            liar.spoil = lie
            found, failures = dispatched(dispatcher, mailbox)
            assert torch.equal(found, right)
            assert not failures
            liar.spoil, liar.identity = lambda rows: rows, liar.identity + "+"
            dispatcher.follow(build_placement(held), {each.address: each for each in workers})
    while mailbox.receive(0):
        pass
    assert dispatcher.crew.retries.active == 0


def test_a_connection_that_is_lost_again_is_no_new_process(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = audited(checkpoint, mailbox, 2)
    workers[0].spoil = lie
    dispatched(dispatcher, mailbox)
    for identity in ("", "1"):  # a worker's identity is empty while it is not connected
        workers[0].identity = identity
        follow(dispatcher, workers)
    assert list(dispatcher.crew.out()) == [workers[0].address]
