"""What happens to the rows of an expert that nobody holds any more, by policy."""

from __future__ import annotations

import pytest
import torch

from consilium.checkpoint import Checkpoint
from consilium.config import GatewayConfig, LastReplica
from consilium.errors import CheckpointError, ExpertUnavailable, WireError
from consilium.gate import Routing
from gateway.batches import combine, group_by_expert, renormalised
from gateway.dispatcher import Dispatcher
from gateway.mailbox import Mailbox
from gateway.placement import build_placement
from tests.local_workers import LocalWorker, local_dispatcher
from tests.tiny_models import save_mixtral
from tests.unit.test_dispatcher import TOKENS, dispatched, expected, layer_input

LOST = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(lambda event: pytest.fail(f"unexpected {event}"))


def lost_rows() -> set[int]:
    _, routing = layer_input()
    return {row for row in range(TOKENS) if LOST in routing.ids[row]}


def without_last(
    checkpoint: Checkpoint, mailbox: Mailbox, policy: LastReplica, timeout: float = 10
) -> tuple[Dispatcher, list[LocalWorker]]:
    """Two workers, of which the second, with one expert, fails."""
    config = GatewayConfig(layer_timeout=timeout, audit=0, last_replica=policy)
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 1, 2], [LOST]], config=config)
    workers[1].misbehave = lambda _: ExpertUnavailable("gone")
    return dispatcher, workers


def test_it_is_computed_here(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = without_last(checkpoint, mailbox, "local")
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    dispatcher.follow(build_placement({}), {})  # nobody is left at all
    x, routing = layer_input()
    outputs, failures = mailbox.drive(dispatcher.dispatch(1, group_by_expert(x, None, routing)))
    assert torch.allclose(combine(outputs, routing), expected(checkpoint), atol=1e-5)
    assert outputs.stood_in == set(range(TOKENS))
    assert len(workers[1].frames) == 1


def test_where_the_checkpoint_has_no_experts_the_rows_fail(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, _ = without_last(checkpoint, mailbox, "local")

    def unable() -> None:
        raise CheckpointError("no such tensor")

    dispatcher.crew.local = unable  # type: ignore[assignment]
    _, failures = dispatched(dispatcher, mailbox)
    assert set(failures) == lost_rows()


def test_it_is_waited_for(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = without_last(checkpoint, mailbox, "wait")
    held = {workers[0].address: [(1, each) for each in range(3)]}

    def lose() -> None:
        dispatcher.follow(build_placement(held), {workers[0].address: workers[0]})
        mailbox.post(lambda: mailbox.post(come_back))

    def come_back() -> None:
        workers[1].misbehave = lambda _: None
        both = {**held, workers[1].address: [(1, LOST)]}
        dispatcher.follow(build_placement(both), {worker.address: worker for worker in workers})

    mailbox.post(lose)
    x, routing = layer_input()
    outputs, failures = mailbox.drive(dispatcher.dispatch(1, group_by_expert(x, None, routing)))
    assert torch.allclose(combine(outputs, routing), expected(checkpoint), atol=1e-5)
    assert not failures
    assert outputs.stood_in == lost_rows()


def test_who_fails_but_stays_is_asked_again_until_the_layer_ends(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = without_last(checkpoint, mailbox, "wait")
    workers[1].misbehave = lambda _: WireError("garbage") if len(workers[1].frames) < 3 else None
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    dispatcher, _ = without_last(checkpoint, mailbox, "wait", timeout=0.15)
    _, failures = dispatched(dispatcher, mailbox)
    assert set(failures) == lost_rows()
    assert "gone" in str(failures[min(lost_rows())])


def test_it_is_left_out_and_the_others_make_up_for_it(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, _ = without_last(checkpoint, mailbox, "renormalise")
    x, routing = layer_input()
    outputs, failures = mailbox.drive(dispatcher.dispatch(1, group_by_expert(x, None, routing)))
    assert not failures
    assert outputs.stood_in == lost_rows()
    assert outputs.left_out is not None
    new, alone = renormalised(routing, outputs.left_out)
    assert not alone
    kept = [row for row in range(TOKENS) if row not in lost_rows()]
    assert torch.equal(new.weights[kept], routing.weights[kept])
    assert torch.allclose(new.weights.sum(dim=1), routing.weights.sum(dim=1))
    assert not new.weights[routing.ids == LOST].any()
    found = combine(outputs, new)
    assert torch.allclose(found[kept], expected(checkpoint)[kept], atol=1e-5)
    row = min(lost_rows())
    other = int(torch.nonzero(routing.ids[row] != LOST)[0])
    outputs_of_other = dict(enumerate(outputs.rows(torch.arange(row * 2, row * 2 + 2).numpy())))
    assert torch.allclose(found[row], outputs_of_other[other] * routing.weights[row].sum(), atol=1e-5)


def test_a_token_without_any_expert_left_is_named() -> None:
    routing = Routing(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.5, 0.5], [0.25, 0.5]]))
    new, alone = renormalised(routing, torch.tensor([0, 2, 3]).numpy())
    assert alone == [1]
    assert new.weights.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_by_default_the_rows_fail(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, _ = without_last(checkpoint, mailbox, "fail")
    _, failures = dispatched(dispatcher, mailbox)
    assert set(failures) == lost_rows()
