"""Dispatch over workers that fail: who is asked again, and which rows are lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest
from consilium.frames import Frame
from consilium.gate import Routing, softmax_top_k
from gateway.batches import combine, group_by_expert
from gateway.dispatcher import Dispatcher
from gateway.mailbox import Mailbox
from gateway.messages import EXPERT_CALL_ROWS, ExpertLoad
from tests.local_workers import LocalWorker, local_dispatcher, outputs_of, reference_rows
from tests.tiny_models import save_mixtral

TOKENS = 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_mixtral(tmp_path_factory.mktemp("mixtral")))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(lambda event: pytest.fail(f"unexpected {event}"))


def layer_input() -> tuple[Tensor, Routing]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, 64, generator=generator)
    return x, softmax_top_k(torch.randn(TOKENS, 4, generator=generator), 2, normalize=True)


def expected(checkpoint: Checkpoint) -> Tensor:
    x, routing = layer_input()
    outputs = torch.zeros(TOKENS, 2, 64)
    for token in range(TOKENS):
        for k, expert in enumerate(routing.ids[token].tolist()):
            frame = Frame(1, x[token : token + 1], None, [expert], [0, 1], torch.zeros(1, dtype=torch.int32))
            outputs[token, k] = reference_rows(checkpoint, frame)
    return combine(outputs_of(outputs.view(-1, 64)), routing)


def dispatched(dispatcher: Dispatcher, mailbox: Mailbox) -> tuple[Tensor, dict[int, Exception]]:
    x, routing = layer_input()
    outputs, failures = mailbox.drive(dispatcher.dispatch(1, group_by_expert(x, None, routing)))
    return combine(outputs, routing), failures


def break_down(worker: LocalWorker, error: Exception) -> None:
    worker.misbehave = lambda _: error


def test_one_frame_per_worker(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 3], [1], [2]])
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    assert [len(worker.frames) for worker in workers] == [1, 1, 1]
    stats = {each.address: each for each in dispatcher.take_stats()}
    assert sum(each.rows for each in stats.values()) == TOKENS * 2
    assert dispatcher.take_stats() == []


def test_large_frames_go_in_pieces_but_not_over_local_links(
    checkpoint: Checkpoint, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = local_dispatcher(checkpoint, mailbox, [[0, 3], [1, 2]])
    expected, _ = dispatched(whole, mailbox)
    monkeypatch.setattr("gateway.frames_in_flight.PIECE_BYTES", 64 * 4)  # one row
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 3], [1, 2]])
    workers[1].local_link = True
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.equal(found, expected)
    assert not failures
    assert [[frame.experts for frame in worker.frames] for worker in workers] == [[[0], [3]], [[1, 2]]]


def test_a_piece_that_fails_is_had_elsewhere_and_the_others_count(
    checkpoint: Checkpoint, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.frames_in_flight.PIECE_BYTES", 64 * 4)
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 1, 2, 3], [0, 1, 2, 3]])
    first = workers[0]
    first.misbehave = lambda _: ExpertUnavailable("gone") if len(first.frames) == 1 else None
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    stats = dispatcher.take_stats()
    assert sum(each.rows for each in stats) == TOKENS * 2
    assert {each.address: each.failures for each in stats} == {first.address: 1, workers[1].address: 0}
    assert len(first.frames) > 1, "its other pieces were taken"


def test_a_replica_answers_for_a_failed_worker(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 1, 2, 3], [0, 1], [2, 3]])
    break_down(workers[0], ExpertUnavailable("the stream broke"))
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures
    stats = {each.address: each for each in dispatcher.take_stats()}
    assert [stats[worker.address].failures for worker in workers] == [1, 0, 0]
    assert stats[workers[0].address].failovers == 0
    assert sum(each.failovers for each in stats.values()) > 0


def test_calls_of_experts_are_counted_by_their_rows(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, _ = local_dispatcher(checkpoint, mailbox, [range(4)])
    _, routing = layer_input()
    dispatched(dispatcher, mailbox)
    dispatched(dispatcher, mailbox)
    (stats,) = dispatcher.take_stats()
    expected = [0] * (len(EXPERT_CALL_ROWS) + 1)
    for rows in torch.bincount(routing.ids.flatten(), minlength=4).tolist():
        expected[next(place for place, bound in enumerate(EXPERT_CALL_ROWS) if rows <= bound)] += 2
    assert stats.expert_calls == expected


def test_the_meter_counts_each_row_once_whoever_computes_it(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [range(4), range(4)])
    break_down(workers[0], ExpertUnavailable("the stream broke"))
    _, routing = layer_input()
    assert dispatcher.meter.due_in() is None
    dispatched(dispatcher, mailbox)
    report = dispatcher.meter.take_report()
    assert report == ExpertLoad({1: torch.bincount(routing.ids.flatten(), minlength=4).tolist()})
    assert dispatcher.meter.due_in() is None
    dispatched(dispatcher, mailbox)
    assert dispatcher.meter.take_report() is None  # not within a second of the last one
    due = dispatcher.meter.due_in()
    assert due is not None
    assert 0 < due <= 1


def test_only_rows_of_a_lost_expert_fail(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [[0, 1, 2], [3]])
    break_down(workers[1], ExpertUnavailable("gone"))
    found, failures = dispatched(dispatcher, mailbox)
    _, routing = layer_input()
    lost = {row for row in range(TOKENS) if 3 in routing.ids[row]}
    assert set(failures) == lost
    assert 0 < len(lost) < TOKENS
    kept = [row for row in range(TOKENS) if row not in lost]
    assert torch.allclose(found[kept], expected(checkpoint)[kept], atol=1e-5)
    message = str(failures[min(lost)])
    assert "of layer 1" in message
    assert "gone" in message


def test_an_error_that_cannot_change_is_not_tried_again(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [range(4), range(4)])
    for worker in workers:
        break_down(worker, InvalidRequest("no"))
    _, failures = dispatched(dispatcher, mailbox)
    assert len(failures) == TOKENS
    assert all(len(worker.frames) <= 1 for worker in workers)


def test_a_wrong_reply_goes_to_the_other_replica(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [range(4), range(4)])

    def short(frame: Frame) -> Exception | None:
        del frame.experts[-1], frame.offsets[-1]  # so that it answers with too few rows
        return None

    workers[0].misbehave = short
    found, failures = dispatched(dispatcher, mailbox)
    assert torch.allclose(found, expected(checkpoint), atol=1e-5)
    assert not failures


def test_silence_ends_at_the_deadline(checkpoint: Checkpoint, mailbox: Mailbox) -> None:
    dispatcher, workers = local_dispatcher(checkpoint, mailbox, [range(4)])
    object.__setattr__(workers[0], "time_limit", lambda _: 0.05)
    workers[0].silent = True
    _, failures = dispatched(dispatcher, mailbox)
    assert len(failures) == TOKENS
    assert isinstance(failures[0], DeadlineExceeded)
