"""Both ends of a local link against each other, and the gateway's against a worker that lies, over a socket pair."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from consilium.config import RowDType
from consilium.errors import Cancelled, ConsiliumError, ExpertUnavailable, StalePlacement, WireError
from consilium.frames import Frame, encode_call
from consilium.link_packets import (
    CALL,
    ERROR,
    CallPacket,
    RowFormat,
    pack_cancel,
    pack_error,
    pack_result,
    unpack_cancel,
)
from consilium.local_socket import PACKET
from consilium.quantization import quantize_rows
from consilium.rpc import to_call_error
from consilium.shared_memory import ALIGNMENT, SharedMemory
from expert_service.executor import Executor
from expert_service.local_link import LocalLink as WorkerLink
from gateway.local_link import LocalLink
from gateway.mailbox import Completion, Mailbox
from gateway.worker import Reply
from protos.expert.v1 import expert_pb2
from tests.links import shared_memory, socket_pair
from tests.unit.test_executor import LAYER, compute, make_computer, make_frame
from tests.unit.test_experts import HIDDEN

SECONDS = 30.0
SIZE = 2**18
FORM = RowFormat(HIDDEN, torch.float32, torch.float32)
ROW_BYTES = 4 * HIDDEN
LARGE = 60  # rows: a few of such frames fill the memory


@dataclass
class Gateway:
    """The gateway's end, with what it was told; ``peer`` is the other end where a test plays the worker."""

    link: LocalLink
    mailbox: Mailbox
    peer: socket.socket
    memory: SharedMemory  # as the worker maps it
    lost: list[ConsiliumError]
    unavailable: list[ConsiliumError]
    calls: int = 0

    def send(self, frame: Frame, seconds: float = SECONDS) -> Completion[Reply] | None:
        """Start a call; None when there is no room."""
        self.calls += 1
        call_id = self.calls

        def expire() -> None:
            self.link.give_up(call_id)

        completion: Completion[Reply] = Completion(time.monotonic() + seconds, expire)
        return completion if self.link.send(call_id, frame, int(seconds * 1e3), completion) else None

    def must_send(self, frame: Frame) -> Completion[Reply]:
        completion = self.send(frame)
        assert completion is not None
        return completion

    def outcome(self, call: Completion[Reply]) -> Reply:
        async def wait() -> Reply:
            return await call

        return self.mailbox.drive(wait())

    def receive(self) -> CallPacket:
        """The next call, as a peer of the test's receives it."""
        self.peer.settimeout(SECONDS)
        return CallPacket.unpack(memoryview(self.peer.recv(PACKET)))

    def refuse(self, call_id: int, error: expert_pb2.CallError) -> None:
        self.peer.send(pack_error(call_id, error.SerializeToString()))

    def read_all(self) -> None:
        """What the peer has sent until now."""
        while self.mailbox.receive(0):
            pass

    def assert_nothing_in_use(self) -> None:
        whole = self.link._regions.take(SIZE)
        assert whole == 0, "a region is still in use"
        self.link._regions.free(whole)


def open_gateway(form: RowFormat = FORM) -> Gateway:
    ours, theirs = socket_pair()
    memory, attached = shared_memory(SIZE)
    mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
    made = Gateway(LocalLink(ours, memory, form, mailbox), mailbox, theirs, attached, [], [])
    made.link.on_lost, made.link.on_unavailable = made.lost.append, made.unavailable.append
    made.link.start()
    return made


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = open_gateway()
    yield made
    made.link.lose(ExpertUnavailable("the test is over"))
    made.peer.close()


@pytest.fixture
def served(gateway: Gateway) -> Iterator[Gateway]:
    """A gateway whose peer is a worker in float32."""
    executor = Executor(make_computer(), 64, 2**24)
    executor.add_link(WorkerLink(gateway.peer, gateway.memory, FORM, executor.submit))
    yield gateway
    assert executor.close(SECONDS)


def rows_of(reply: Reply, frame: Frame, dtype: torch.dtype = torch.float32) -> Tensor:
    """A copy of the result's rows, which are released."""
    rows = reply.rows(frame.indices.numel(), HIDDEN, dtype).clone()
    reply.release()
    return rows


def directly(frame: Frame, quantization: str = "none", dtype: RowDType = "float32") -> Tensor:
    """What the computer says to the same frame without a link."""
    (rows,) = compute(make_computer(quantization=quantization, dtype=dtype), encode_call(frame, 1))
    return rows


# -- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "experts"), [(0, ()), (3, ()), (1, (4,)), (5, (0, 4)), (LARGE, (0, 4))])
def test_a_frame_goes_there_and_its_rows_come_back(served: Gateway, rows: int, experts: tuple[int, ...]) -> None:
    frame = make_frame(rows, experts)
    reply = served.outcome(served.must_send(frame))
    expected = directly(frame)
    assert torch.equal(rows_of(reply, frame), expected)
    assert reply.bytes_sent >= rows * ROW_BYTES
    assert reply.bytes_received == expected.nbytes
    served.assert_nothing_in_use()


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_every_format(quantization: str, dtype: RowDType) -> None:
    computer, frame = make_computer(quantization=quantization, dtype=dtype), make_frame(LARGE)
    if quantization == "int8":
        rows, scales = quantize_rows(frame.rows)
        frame = replace(frame, rows=rows, scales=scales)
    else:
        frame = replace(frame, rows=frame.rows.to(computer.form.rows))
    gateway, executor = open_gateway(computer.form), Executor(computer, 4, 2**24)
    executor.add_link(WorkerLink(gateway.peer, gateway.memory, computer.form, executor.submit))
    try:
        found = rows_of(gateway.outcome(gateway.must_send(frame)), frame, computer.form.replies)
        assert torch.equal(found, directly(frame, quantization, dtype))
        gateway.assert_nothing_in_use()
    finally:
        gateway.link.lose(ExpertUnavailable("the test is over"))
        assert executor.close(SECONDS)


def test_many_calls_at_once_get_their_own_rows(served: Gateway) -> None:
    frames = [make_frame(rows, experts) for rows in (1, 30, 7, 40) for experts in ((0, 4), (1,), (0, 1, 4))]
    calls = [served.must_send(frame) for frame in frames]
    for frame, call in reversed(list(zip(frames, calls, strict=True))):
        assert torch.allclose(rows_of(served.outcome(call), frame), directly(frame), atol=1e-6)
    served.assert_nothing_in_use()


def test_rows_are_kept_until_they_are_released(served: Gateway) -> None:
    frame, other = make_frame(LARGE), make_frame(LARGE - 1)
    reply = served.outcome(served.must_send(frame))
    for _ in range(5):
        rows_of(served.outcome(served.must_send(other)), other)
    assert torch.equal(rows_of(reply, frame), directly(frame))


def test_no_room_is_told_and_leaves_nothing(served: Gateway) -> None:
    frame, calls = make_frame(LARGE), list[Completion[Reply]]()
    while (call := served.send(frame)) is not None:
        calls.append(call)
    assert len(calls) > 1
    assert len(served.link._pending) == len(calls)
    for call in calls:
        assert torch.equal(rows_of(served.outcome(call), frame), directly(frame))
    served.assert_nothing_in_use()
    rows_of(served.outcome(served.must_send(frame)), frame)


def test_no_room_for_the_result_alone(gateway: Gateway) -> None:
    taken = gateway.link._regions.take(SIZE - 2 * LARGE * ROW_BYTES - ALIGNMENT)
    assert taken is not None
    assert gateway.send(make_frame(LARGE)) is None  # its rows would find room, those of the result do not
    gateway.link._regions.free(taken)
    gateway.assert_nothing_in_use()
    with pytest.raises(BlockingIOError):
        gateway.peer.recv(PACKET)


def test_an_error_of_one_call_leaves_the_others(served: Gateway) -> None:
    good, bad = make_frame(LARGE), make_frame(LARGE, (0, 2))
    first, failed, last = served.must_send(good), served.must_send(bad), served.must_send(good)
    with pytest.raises(StalePlacement, match="experts 2 of layer 3"):
        served.outcome(failed)
    for call in (first, last):
        assert torch.equal(rows_of(served.outcome(call), good), directly(good))
    served.assert_nothing_in_use()
    assert not served.lost


def test_the_worker_ends_and_the_gateway_sees_it(served: Gateway) -> None:
    rows_of(served.outcome(served.must_send(make_frame(1))), make_frame(1))
    served.peer.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ExpertUnavailable, match="its local socket"):
        served.outcome(served.must_send(make_frame(2)))
    assert not served.link.open


# -- what the gateway itself may not do --------------------------------------------------------------------------------

ROWS = torch.ones(2, HIDDEN)
MISFITS = {
    "another dtype": (ROWS.bfloat16(), None),
    "int8 without scales": (ROWS.to(torch.int8), None),
    "scales that nobody reads": (ROWS, torch.ones(2)),
    "one number a row": (ROWS[:, :1], None),
    "wider rows": (torch.ones(2, HIDDEN + 1), None),
}


@pytest.mark.parametrize(("rows", "scales"), MISFITS.values(), ids=MISFITS.keys())
def test_a_frame_of_other_rows_fails_and_is_not_converted(
    gateway: Gateway, rows: Tensor, scales: Tensor | None
) -> None:
    frame = replace(make_frame(2), rows=rows, scales=scales)
    with pytest.raises(WireError, match=rf"rows: expected \[any, {HIDDEN}\] torch.float32 without scales, found"):
        gateway.outcome(gateway.must_send(frame))
    gateway.assert_nothing_in_use()
    with pytest.raises(BlockingIOError):
        gateway.peer.recv(PACKET)


@pytest.mark.parametrize(
    ("pairs", "hidden_size", "dtype"),
    [
        (2 * LARGE + 1, HIDDEN, torch.float32),
        (2 * LARGE - 1, HIDDEN, torch.float32),
        (2**40, HIDDEN, torch.float32),
        (HIDDEN, 2 * LARGE, torch.float32),
        (2 * LARGE, HIDDEN, torch.bfloat16),
        (4 * LARGE, HIDDEN, torch.bfloat16),
    ],
)
def test_rows_that_were_not_asked_for_are_refused(
    gateway: Gateway, pairs: int, hidden_size: int, dtype: torch.dtype
) -> None:
    call = gateway.must_send(make_frame(LARGE))
    gateway.peer.send(pack_result(1, 0, 0))
    reply = gateway.outcome(call)
    with pytest.raises(WireError, match="result rows"):
        reply.rows(pairs, hidden_size, dtype)
    assert reply.rows(2 * LARGE, HIDDEN, torch.float32).shape == (2 * LARGE, HIDDEN)


# -- a worker that misbehaves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [expert_pb2.CallError(), expert_pb2.CallError(code="?", message="m", retryable=True)])
def test_an_error_without_sense_is_an_error(gateway: Gateway, error: expert_pb2.CallError) -> None:
    call = gateway.must_send(make_frame(LARGE))
    gateway.refuse(1, error)
    with pytest.raises(ConsiliumError):
        gateway.outcome(call)
    gateway.assert_nothing_in_use()


def test_answers_that_nobody_asked_for_are_left_alone(gateway: Gateway) -> None:
    first, second = gateway.must_send(make_frame(1)), gateway.must_send(make_frame(1))
    for unknown in (77, 0, 2**64 - 1):
        gateway.peer.send(pack_result(unknown, 1, 1))
        gateway.refuse(unknown, expert_pb2.CallError(code="UNAVAILABLE", message="draining"))
    gateway.peer.send(pack_result(1, 5, 6))
    gateway.peer.send(pack_result(1, 7, 8))  # twice: the first stands
    gateway.refuse(1, expert_pb2.CallError(message="after all"))
    gateway.refuse(2, expert_pb2.CallError(message="no"))
    gateway.peer.send(pack_result(2, 9, 10))
    reply = gateway.outcome(first)
    with pytest.raises(ConsiliumError, match="no"):
        gateway.outcome(second)
    gateway.read_all()
    assert (reply.queue_us, reply.compute_us) == (5, 6)
    assert gateway.link.open
    assert not gateway.unavailable
    assert gateway.link._regions.take(SIZE) is None, "rows that are not released are still in use"
    reply.release()
    gateway.assert_nothing_in_use()


def test_a_call_that_nobody_wants_keeps_its_block_until_the_worker_has_answered(gateway: Gateway) -> None:
    call = gateway.must_send(make_frame(3))
    call_id = gateway.receive().call_id
    assert gateway.link.cancel(call_id)
    assert unpack_cancel(memoryview(gateway.peer.recv(PACKET))) == call_id
    assert gateway.link._regions.take(SIZE) is None
    assert call.outcome is None
    gateway.refuse(call_id, to_call_error(Cancelled("not computed")))
    gateway.read_all()
    assert isinstance(call.outcome, Cancelled)
    assert not gateway.link.cancel(call_id), "it is answered"
    gateway.assert_nothing_in_use()


def test_a_draining_worker_is_told_of(gateway: Gateway) -> None:
    call = gateway.must_send(make_frame(1))
    gateway.refuse(1, expert_pb2.CallError(code="UNAVAILABLE", message="draining", retryable=True))
    with pytest.raises(ExpertUnavailable, match="draining"):
        gateway.outcome(call)
    assert [error.message for error in gateway.unavailable] == ["draining"]
    assert gateway.link.open, "what it has taken will be answered"


RESULT_PACKET = pack_result(1, 0, 0)
ERROR_PACKET = pack_error(1, expert_pb2.CallError(message="x" * 50).SerializeToString())
ERROR_HEAD = len(pack_error(1, b""))
GARBAGE = {
    "kind 0": bytes(len(RESULT_PACKET)),
    "kind 255": b"\xff" * 100,
    "a call": bytes([CALL]) + RESULT_PACKET[1:],
    "a cancel": pack_cancel(1),
    "an error's head cut off": ERROR_PACKET[: ERROR_HEAD - 1],
    "an error's kind alone": bytes([ERROR]),
    "an error cut off": ERROR_PACKET[:-10],
    "an error that is no protobuf": ERROR_PACKET[:ERROR_HEAD] + b"\xff" * 10,
    "an error that is no text": pack_error(1, b"\x0a\x02\xff\xff"),
    "an error too long for a packet": pack_error(1, expert_pb2.CallError(message="x" * PACKET).SerializeToString()),
    "a result too long for a packet": RESULT_PACKET + bytes(PACKET),
    "a result with one byte more": RESULT_PACKET + b"\0",
} | {f"a result's first {length} bytes": RESULT_PACKET[:length] for length in range(1, len(RESULT_PACKET))}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_loses_the_link_and_its_calls_may_go_elsewhere(gateway: Gateway, packet: bytes) -> None:
    calls = [gateway.must_send(make_frame(rows)) for rows in (1, LARGE)]
    gateway.peer.send(packet)
    for call in calls:
        with pytest.raises(ExpertUnavailable, match="is no answer") as caught:
            gateway.outcome(call)
        assert caught.value.retryable
    assert len(gateway.lost) == 1
    assert not gateway.link.open


def test_the_end_of_the_link_settles_every_call_on_it(gateway: Gateway) -> None:
    calls = [gateway.must_send(make_frame(rows)) for rows in (1, LARGE, 2)]
    assert [gateway.receive().call_id for _ in calls] == [1, 2, 3]
    gateway.peer.send(pack_result(2, 0, 7))
    gateway.peer.close()
    assert gateway.outcome(calls[1]).compute_us == 7, "what came before the end counts"
    for call in (calls[0], calls[2]):
        with pytest.raises(ExpertUnavailable):
            gateway.outcome(call)
    assert len(gateway.lost) == 1
    assert not gateway.link._pending


def test_rows_outlive_the_link_they_came_over(gateway: Gateway) -> None:
    frame = make_frame(LARGE)
    call = gateway.must_send(frame)
    gateway.memory.array((SIZE,), "uint8", 0)[:] = 1
    gateway.peer.send(pack_result(1, 0, 0))
    reply = gateway.outcome(call)
    gateway.peer.close()
    gateway.read_all()
    assert not gateway.link.open
    assert rows_of(reply, frame).view(torch.uint8).eq(1).all()


def test_a_link_that_is_gone_already_fails_the_call(gateway: Gateway) -> None:
    gateway.peer.close()
    with pytest.raises(ExpertUnavailable, match="takes nothing"):
        gateway.outcome(gateway.must_send(make_frame(LARGE)))
    assert len(gateway.lost) == 1


def test_a_worker_that_does_not_read_loses_the_link(gateway: Gateway) -> None:
    small = Frame(LAYER, torch.ones(0, HIDDEN), None, [], [0], torch.empty(0, dtype=torch.int32))
    calls = []
    while gateway.link.open:
        calls.append(gateway.must_send(small))
    for call in calls:
        with pytest.raises(ExpertUnavailable, match="takes nothing"):
            gateway.outcome(call)


def test_a_call_that_expires_loses_the_link(gateway: Gateway) -> None:
    """The worker may still write into its block: nobody else gets it."""
    other = gateway.must_send(make_frame(LARGE))
    late = gateway.send(make_frame(LARGE), seconds=0.01)
    assert late is not None
    with pytest.raises(ExpertUnavailable, match="did not answer in time"):
        gateway.outcome(late)
    with pytest.raises(ExpertUnavailable, match="did not answer in time"):
        gateway.outcome(other)
    assert [error.message for error in gateway.lost] == ["did not answer in time"]
    assert not gateway.link.give_up(1), "it is not open any more"
