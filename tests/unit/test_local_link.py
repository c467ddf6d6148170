"""Both ends of a local link against each other, and each against a peer that lies, over a socket pair."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import ConsiliumError, ExpertUnavailable, StalePlacement, WireError
from consilium.frames import Frame, decode_call, decode_result, encode_call
from consilium.gate import softmax_top_k
from consilium.local_socket import INLINE, PACKET
from consilium.quantization import quantize_rows
from consilium.shared_memory import ALIGNMENT, SharedMemory
from expert_service.executor import Executor
from expert_service.local_link import LocalLink as WorkerLink
from gateway.batches import group_by_expert
from gateway.dispatcher import Reply
from gateway.local_link import LocalLink
from gateway.mailbox import Completion, Mailbox
from protos.expert.v1 import expert_pb2
from protos.tensor.v1 import tensor_pb2
from tests.local_workers import local_dispatcher
from tests.local_workers import rows_of as rows_in
from tests.tiny_models import save_mixtral
from tests.unit.test_executor import LAYER, Gate, compute, make_computer, make_frame
from tests.unit.test_experts import HIDDEN

SECONDS = 30.0
SIZE = 2**18
ROW_BYTES = 4 * HIDDEN
LARGE = 60  # rows: they, and the result, are larger than what goes into a packet


def pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


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

    def receive(self) -> expert_pb2.Call:
        """The next call, as a peer of the test's receives it."""
        self.peer.settimeout(SECONDS)
        return expert_pb2.ForwardRequest.FromString(self.peer.recv(PACKET)).call

    def answer(self, call_id: int, **outcome: expert_pb2.Result | expert_pb2.CallError) -> None:
        response = expert_pb2.ForwardResponse(call_id=call_id, **outcome)  # type: ignore[arg-type] # one of the two
        self.peer.send(response.SerializeToString())

    def assert_nothing_in_use(self) -> None:
        whole = self.link._regions.take(SIZE)
        assert whole == 0, "a region is still in use"
        self.link._regions.free(whole)


def open_gateway(size: int = SIZE) -> Gateway:
    ours, theirs = pair()
    memory, descriptor = SharedMemory.create(size)
    attached = SharedMemory.attach(descriptor)
    os.close(descriptor)
    mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
    made = Gateway(LocalLink(ours, memory, ROW_BYTES, mailbox), mailbox, theirs, attached, [], [])
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
    executor.add_link(WorkerLink(gateway.peer, gateway.memory, executor.submit))
    yield gateway
    assert executor.close(SECONDS)


def rows_of(reply: Reply, frame: Frame) -> Tensor:
    """A copy of the result's rows, which are released."""
    rows = decode_result(reply.result, frame.indices.numel(), HIDDEN, torch.float32, reply.memory).clone()
    reply.release()
    return rows


def directly(frame: Frame, quantization: str = "none") -> Tensor:
    """What the computer says to the same frame without a link."""
    (result,) = compute(make_computer(quantization=quantization), encode_call(frame, 1))
    return decode_result(result, frame.indices.numel(), HIDDEN, torch.float32)


# -- both ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5, LARGE])
def test_a_frame_goes_there_and_its_rows_come_back(served: Gateway, rows: int) -> None:
    frame = make_frame(rows)
    reply = served.outcome(served.must_send(frame))
    assert reply.result.rows.HasField("offset") == (2 * rows * ROW_BYTES > INLINE)
    expected = directly(frame)
    assert torch.equal(rows_of(reply, frame), expected)
    assert min(reply.bytes_sent, reply.bytes_received) >= rows * ROW_BYTES
    served.assert_nothing_in_use()


def test_int8_rows_with_their_scales(gateway: Gateway) -> None:
    """So many that the scales do not go into the packet either."""
    many = INLINE // 4 + 1
    rows, scales = quantize_rows(torch.randn(many, HIDDEN, generator=torch.Generator().manual_seed(1)))
    indices = torch.tensor([many - 1, 0, 1], dtype=torch.int32)
    frame = Frame(LAYER, rows, scales, [0, 4], [0, 1, 3], indices)
    computer = make_computer(quantization="int8")
    computer._max_frame = 2**24
    executor = Executor(computer, 4, 2**24)
    executor.add_link(WorkerLink(gateway.peer, gateway.memory, executor.submit))
    try:
        reply = gateway.outcome(gateway.must_send(frame))
    finally:
        assert executor.close(SECONDS)
    small = replace(frame, rows=rows[indices], scales=scales[indices], indices=torch.arange(3, dtype=torch.int32))
    assert torch.equal(rows_of(reply, frame), directly(small, "int8"))
    assert reply.bytes_sent >= rows.nbytes + scales.nbytes
    gateway.assert_nothing_in_use()


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
    taken = gateway.link._regions.take(SIZE - LARGE * ROW_BYTES - ALIGNMENT)
    assert taken is not None
    assert gateway.send(make_frame(LARGE)) is None  # its rows find room, those of the result do not
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


# -- the gateway's end, with a worker that misbehaves ------------------------------------------------------------------


def result_at(offset: int, shape: Sequence[int], dtype: tensor_pb2.Dtype.ValueType) -> expert_pb2.Result:
    return expert_pb2.Result(rows=tensor_pb2.Tensor(dtype=dtype, shape=shape, offset=offset))


LIES = {
    "outside": result_at(SIZE, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_FLOAT32),
    "over the end": result_at(SIZE - 64, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_FLOAT32),
    "far away": result_at(2**64 - 64, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_FLOAT32),
    "not aligned": result_at(4, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_FLOAT32),
    "fewer rows": result_at(0, (2 * LARGE - 1, HIDDEN), tensor_pb2.DTYPE_FLOAT32),
    "narrower rows": result_at(0, (2 * LARGE, HIDDEN - 1), tensor_pb2.DTYPE_FLOAT32),
    "another dtype": result_at(0, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_BFLOAT16),
    "no dtype": result_at(0, (2 * LARGE, HIDDEN), tensor_pb2.DTYPE_UNSPECIFIED),
    "nothing": expert_pb2.Result(),
    "a huge shape": result_at(0, (2**32 - 1, 2**32 - 1), tensor_pb2.DTYPE_FLOAT32),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_result_that_lies_is_an_error_of_its_call(gateway: Gateway, lie: expert_pb2.Result) -> None:
    call = gateway.must_send(make_frame(LARGE))
    gateway.answer(gateway.receive().call_id, result=lie)
    reply = gateway.outcome(call)
    with pytest.raises(WireError, match="result rows"):
        decode_result(reply.result, 2 * LARGE, HIDDEN, torch.float32, reply.memory)
    reply.release()
    gateway.assert_nothing_in_use()
    assert gateway.link.open


class LinkedWorker:
    """The dispatcher's protocol over the link; its peer answers every call with a lie."""

    group = "experts"
    local_link = True

    def __init__(self, gateway: Gateway, address: str, lie: expert_pb2.Result) -> None:
        self.address, self._gateway, self._lie = address, gateway, lie

    def time_limit(self, pairs: int) -> float:  # noqa: ARG002 (the protocol's)
        return SECONDS

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:  # noqa: ARG002 (the protocol's)
        call = self._gateway.must_send(frame)
        self._gateway.answer(self._gateway.receive().call_id, result=self._lie)
        return call


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_the_frame_of_a_result_that_lies_goes_to_the_replica(
    gateway: Gateway, lie: expert_pb2.Result, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(save_mixtral(tmp_path / "tiny"))
    dispatcher, (_, replica) = local_dispatcher(checkpoint, gateway.mailbox, [range(4), range(4)])
    gateway.link._row_bytes = 4 * 64
    liar = LinkedWorker(gateway, "worker-0:1", lie)
    dispatcher.workers = {liar.address: liar, replica.address: replica}
    x = torch.randn(LARGE, 64, generator=torch.Generator().manual_seed(5))
    routing = softmax_top_k(torch.randn(LARGE, 4, generator=torch.Generator().manual_seed(6)), 2, normalize=True)
    batches = group_by_expert(x, None, routing)
    found, failures = gateway.mailbox.drive(dispatcher.dispatch(1, batches))
    alone, _ = local_dispatcher(checkpoint, gateway.mailbox, [range(4)])
    expected, _ = gateway.mailbox.drive(alone.dispatch(1, batches))
    assert (torch.equal(rows_in(found), rows_in(expected)), failures) == (True, {})
    assert gateway.calls == 1
    assert {each.address: each.failures for each in dispatcher.take_stats()} == {liar.address: 1, replica.address: 0}
    gateway.assert_nothing_in_use()


@pytest.mark.parametrize("error", [expert_pb2.CallError(), expert_pb2.CallError(code="?", message="m", retryable=True)])
def test_an_error_without_sense_is_an_error(gateway: Gateway, error: expert_pb2.CallError) -> None:
    call = gateway.must_send(make_frame(LARGE))
    gateway.answer(1, error=error)
    with pytest.raises(ConsiliumError):
        gateway.outcome(call)
    gateway.assert_nothing_in_use()


def test_an_answer_without_an_outcome_is_an_error(gateway: Gateway) -> None:
    call = gateway.must_send(make_frame(LARGE))
    gateway.answer(1)
    with pytest.raises(ConsiliumError):
        gateway.outcome(call)
    gateway.assert_nothing_in_use()


def test_answers_that_nobody_asked_for_are_left_alone(gateway: Gateway) -> None:
    result = expert_pb2.Result(rows=tensor_pb2.Tensor(shape=[1]))
    call = gateway.must_send(make_frame(1))
    gateway.answer(77, result=result)
    gateway.answer(1, result=result)
    gateway.answer(1, result=expert_pb2.Result())  # twice: the first stands
    assert gateway.outcome(call).result == result
    while gateway.mailbox.receive(0):
        pass
    assert gateway.link.open


def test_a_draining_worker_is_told_of(gateway: Gateway) -> None:
    call = gateway.must_send(make_frame(1))
    gateway.answer(1, error=expert_pb2.CallError(code="UNAVAILABLE", message="draining", retryable=True))
    with pytest.raises(ExpertUnavailable, match="draining"):
        gateway.outcome(call)
    assert [error.message for error in gateway.unavailable] == ["draining"]
    assert gateway.link.open, "what it has taken will be answered"


GARBAGE = {
    "no protobuf": b"\xff" * 100,
    "cut off": expert_pb2.ForwardResponse(call_id=1, error=expert_pb2.CallError(message="x" * 50)).SerializeToString()[
        :-10
    ],
    "too long": expert_pb2.ForwardResponse(
        call_id=1, error=expert_pb2.CallError(message="x" * PACKET)
    ).SerializeToString(),
}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_loses_the_link_and_its_calls_may_go_elsewhere(gateway: Gateway, packet: bytes) -> None:
    calls = [gateway.must_send(make_frame(rows)) for rows in (1, LARGE)]
    gateway.peer.send(packet)
    for call in calls:
        with pytest.raises(ExpertUnavailable, match="no ForwardResponse") as caught:
            gateway.outcome(call)
        assert caught.value.retryable
    assert len(gateway.lost) == 1
    assert not gateway.link.open


def test_the_end_of_the_link_settles_every_call_on_it(gateway: Gateway) -> None:
    calls = [gateway.must_send(make_frame(rows)) for rows in (1, LARGE, 2)]
    for _ in calls:
        gateway.receive()
    gateway.answer(2, result=expert_pb2.Result())
    gateway.peer.close()
    assert gateway.outcome(calls[1]).result == expert_pb2.Result(), "what came before the end counts"
    for call in (calls[0], calls[2]):
        with pytest.raises(ExpertUnavailable):
            gateway.outcome(call)
    assert len(gateway.lost) == 1
    assert not gateway.link._pending


def test_a_link_that_is_gone_already_fails_the_call(gateway: Gateway) -> None:
    gateway.peer.close()
    with pytest.raises(ExpertUnavailable, match="takes nothing"):
        gateway.outcome(gateway.must_send(make_frame(LARGE)))
    assert len(gateway.lost) == 1


def test_a_worker_that_does_not_read_loses_the_link(gateway: Gateway) -> None:
    calls = []
    for _ in range(100_000):
        calls.append(gateway.must_send(make_frame(20, (0,))))
        if not gateway.link.open:
            break
    assert not gateway.link.open
    for call in calls:
        with pytest.raises(ExpertUnavailable, match="takes nothing"):
            gateway.outcome(call)


def test_a_call_that_expires_loses_the_link(gateway: Gateway) -> None:
    """The worker may still write into its regions: nobody else gets them."""
    other = gateway.must_send(make_frame(LARGE))
    late = gateway.send(make_frame(LARGE), seconds=0.01)
    assert late is not None
    with pytest.raises(ExpertUnavailable, match="did not answer in time"):
        gateway.outcome(late)
    with pytest.raises(ExpertUnavailable, match="did not answer in time"):
        gateway.outcome(other)
    assert [error.message for error in gateway.lost] == ["did not answer in time"]
    assert not gateway.link.give_up(1), "it is not open any more"


# -- the worker's end, with a gateway that misbehaves ------------------------------------------------------------------


@dataclass
class Caller:
    """Raw packets to a worker's end, on memory of the test's."""

    socket: socket.socket
    memory: SharedMemory
    executor: Executor

    def send(self, call: expert_pb2.Call) -> None:
        self.socket.send(expert_pb2.ForwardRequest(call=call).SerializeToString())

    def receive(self) -> expert_pb2.ForwardResponse:
        return expert_pb2.ForwardResponse.FromString(self.socket.recv(PACKET))

    def ask(self, call: expert_pb2.Call) -> expert_pb2.ForwardResponse:
        self.send(call)
        return self.receive()

    def refused(self, call: expert_pb2.Call) -> str:
        response = self.ask(call)
        assert response.call_id == call.call_id
        assert response.WhichOneof("outcome") == "error"
        return f"{response.error.code}: {response.error.message}"

    def ended(self) -> bool:
        return self.socket.recv(PACKET) == b""


Computer = Gate | None


def open_caller(computer: Computer = None) -> Caller:
    ours, theirs = pair()
    ours.settimeout(SECONDS)
    memory, descriptor = SharedMemory.create(SIZE)
    attached = SharedMemory.attach(descriptor)
    os.close(descriptor)
    executor = Executor(make_computer() if computer is None else computer, 4, 2**24)
    executor.add_link(WorkerLink(theirs, attached, executor.submit))
    return Caller(ours, memory, executor)


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = open_caller()
    yield made
    made.socket.close()
    assert made.executor.close(SECONDS)


def shared_call(call_id: int = 1) -> expert_pb2.Call:
    """Everything lies in the memory: rows at 0, indices at 2**16, the result at 2**17."""
    places = iter([0, 2**16])
    call = encode_call(make_frame(LARGE), call_id, 0, lambda _: next(places))
    call.result_offset = 2**17
    return call


def placed(caller: Caller) -> expert_pb2.Call:
    frame = make_frame(LARGE)
    caller.memory.view(0, frame.rows.nbytes, "rows")[:] = frame.rows.view(torch.uint8).flatten()
    caller.memory.view(2**16, frame.indices.nbytes, "indices")[:] = frame.indices.view(torch.uint8)
    return shared_call()


def test_rows_indices_and_result_in_memory(caller: Caller) -> None:
    call = placed(caller)
    response = caller.ask(call)
    found = decode_result(response.result, 2 * LARGE, HIDDEN, torch.float32, caller.memory)
    assert response.result.rows.offset == 2**17
    assert torch.equal(found, directly(make_frame(LARGE)))


def offset(name: str, value: int) -> Callable[[expert_pb2.Call], object]:
    return lambda call: setattr(getattr(call, name), "offset", value)


def shape(name: str, *sizes: int) -> Callable[[expert_pb2.Call], None]:
    def change(call: expert_pb2.Call) -> None:
        getattr(call, name).shape[:] = sizes

    return change


def set_experts(*experts: int) -> Callable[[expert_pb2.Call], None]:
    def change(call: expert_pb2.Call) -> None:
        call.experts[:] = experts

    return change


BAD_CALLS: dict[str, tuple[Callable[[expert_pb2.Call], object], str]] = {
    "rows outside": (offset("rows", SIZE), "DATA_LOSS: rows"),
    "rows over the end": (offset("rows", SIZE - 64), "DATA_LOSS: rows"),
    "rows not aligned": (offset("rows", 2), "DATA_LOSS: rows"),
    "rows far away": (offset("rows", 2**64 - 64), "DATA_LOSS: rows"),
    "more rows than there is memory": (shape("rows", 2**32 - 1, HIDDEN), "INVALID_ARGUMENT: the call takes"),
    "more rows than a frame may have": (shape("rows", 2**20, HIDDEN), "INVALID_ARGUMENT: the call takes"),
    "indices outside": (offset("indices", SIZE), "DATA_LOSS: indices"),
    "more indices": (shape("indices", 2 * LARGE + 1), "DATA_LOSS: offsets"),
    "very many indices": (shape("indices", 2**31), "INVALID_ARGUMENT: the call takes"),
    "indices of other bytes": (offset("indices", 0), "DATA_LOSS: indices: must lie"),
    "scales in memory": (lambda call: call.scales.CopyFrom(call.indices), "DATA_LOSS: scales: not expected"),
    "result outside": (lambda call: setattr(call, "result_offset", SIZE), "DATA_LOSS: result_offset"),
    "result over the end": (lambda call: setattr(call, "result_offset", SIZE - 64), "DATA_LOSS: result_offset"),
    "result not aligned": (lambda call: setattr(call, "result_offset", 1), "DATA_LOSS: result_offset"),
    "no dtype": (lambda call: setattr(call.indices, "dtype", 0), "DATA_LOSS: indices"),
    "unknown dtype": (lambda call: setattr(call.rows, "dtype", 99), "DATA_LOSS: rows"),
}


@pytest.mark.parametrize(("change", "said"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_lies_is_refused_and_the_link_goes_on(
    caller: Caller, change: Callable[[expert_pb2.Call], object], said: str
) -> None:
    call = placed(caller)
    change(call)
    assert said in caller.refused(call)
    assert caller.ask(placed(caller)).HasField("result")


def test_a_shape_of_very_many_sizes_costs_no_time(caller: Caller) -> None:
    """Their product would have some hundred thousand bits, and the error all of them."""
    call = placed(caller)
    call.rows.shape[:] = [2**32 - 1] * 10_000
    said = caller.refused(call)
    assert said.startswith(f"DATA_LOSS: rows: expected shape [any, {HIDDEN}]")
    assert len(said) < 1000


def test_indices_that_change_after_they_were_checked_were_copied(caller: Caller) -> None:
    call = placed(caller)
    decoded = decode_call(call, HIDDEN, torch.float32, caller.memory)
    caller.memory.view(2**16, 8 * LARGE, "indices").fill_(0x7F)
    assert torch.equal(decoded.indices, make_frame(LARGE).indices)


def test_a_result_without_a_place_that_is_too_long_for_a_packet(caller: Caller) -> None:
    frame = make_frame(1)
    many = Frame(
        LAYER, frame.rows.repeat(200, 1), None, [0, 1, 4], [0, 200, 400, 600], torch.arange(200).repeat(3).int()
    )
    computer = make_computer()
    computer._max_frame = 2**24
    executor = Executor(computer, 4, 2**24)
    ours, theirs = pair()
    ours.settimeout(SECONDS)
    executor.add_link(WorkerLink(theirs, caller.memory, executor.submit))
    other = Caller(ours, caller.memory, executor)
    assert "give a result_offset" in other.refused(encode_call(many, 3))
    assert other.ask(encode_call(make_frame(2), 4)).HasField("result")
    ours.close()
    assert executor.close(SECONDS)


def test_a_request_that_is_neither_call_nor_cancel(caller: Caller) -> None:
    caller.socket.send(expert_pb2.ForwardRequest(cancel=expert_pb2.Cancel(call_id=9)).SerializeToString())  # unknown
    caller.socket.send(expert_pb2.ForwardRequest(call=encode_call(make_frame(1), 5)).SerializeToString())
    assert caller.receive().call_id == 5


@pytest.mark.parametrize("packet", [b"\xff" * 64, b"\x0a\x7fcut", bytes([10]) * PACKET])
def test_garbage_closes_the_link(caller: Caller, packet: bytes) -> None:
    caller.socket.send(packet)
    assert caller.ended()


def test_an_id_in_use_a_cancel_and_a_disconnect() -> None:
    gate = Gate()
    caller = open_caller(gate)
    for call_id in (1, 2, 3):
        caller.send(encode_call(make_frame(1), call_id))
        if call_id == 1:
            assert gate.entered.wait(SECONDS)  # being computed
    caller.send(encode_call(make_frame(1), 2))
    caller.socket.send(expert_pb2.ForwardRequest(cancel=expert_pb2.Cancel(call_id=3)).SerializeToString())
    gate.opened.set()
    answers = [caller.receive() for _ in range(3)]
    assert [(each.call_id, each.WhichOneof("outcome")) for each in answers] == [
        (1, "result"), (2, "error"), (2, "result"),
    ]  # fmt: skip
    assert "call id 2 is in use" in answers[1].error.message
    caller.send(encode_call(make_frame(1), 4))
    assert caller.receive().call_id == 4
    assert gate.computed == [1, 2, 4]
    caller.socket.close()
    assert caller.executor.close(SECONDS)


@pytest.mark.parametrize(
    "change", [lambda _: None, offset("rows", SIZE), set_experts(0, 2)], ids=["good", "lie", "stale"]
)
def test_the_memory_of_a_gateway_that_is_gone_is_unmapped(change: Callable[[expert_pb2.Call], object]) -> None:
    """At once, and not when the collector comes: errors hold frames, and those what they computed with."""
    ours, theirs = pair()
    ours.settimeout(SECONDS)
    memory, descriptor = SharedMemory.create(SIZE)
    attached = SharedMemory.attach(descriptor)
    os.close(descriptor)
    unmapped = threading.Event()
    weakref.finalize(attached, unmapped.set)
    executor = Executor(make_computer(), 4, 2**24)
    executor.add_link(WorkerLink(theirs, attached, executor.submit))
    del attached, theirs
    caller = Caller(ours, memory, executor)
    call = placed(caller)
    change(call)
    gc.disable()
    try:
        caller.ask(call)
        ours.close()
        assert unmapped.wait(1.0)
    finally:
        gc.enable()
        assert executor.close(SECONDS)


def test_nobody_computes_for_a_gateway_that_is_gone() -> None:
    gate, empty = Gate(), threading.Event()
    caller = open_caller(gate)
    caller.send(encode_call(make_frame(1), 1))
    assert gate.entered.wait(SECONDS)
    caller.send(encode_call(make_frame(1), 2))
    caller.socket.close()
    gate.opened.set()
    caller.executor.queue.when_empty(empty.set)
    assert empty.wait(SECONDS)
    assert caller.executor.close(SECONDS)
    assert 2 not in gate.computed


def test_a_gateway_that_does_not_read_is_given_up() -> None:
    caller = open_caller()

    def ask_for_ever() -> None:
        while True:
            caller.send(encode_call(make_frame(10, (0,)), 1))

    with pytest.raises(ConnectionError):  # a time-out is none
        ask_for_ever()
    caller.socket.close()
    assert caller.executor.close(SECONDS)


def test_a_full_queue_is_an_error_of_the_call() -> None:
    gate = Gate()
    caller = open_caller(gate)
    caller.send(encode_call(make_frame(1), 1))
    assert gate.entered.wait(SECONDS)
    for call_id in range(2, 7):  # read when the first is done
        caller.send(encode_call(make_frame(1), call_id))
    gate.opened.set()
    answers = {each.call_id: each for each in (caller.receive() for _ in range(6))}
    assert [call_id for call_id, each in answers.items() if each.error.code == "RESOURCE_EXHAUSTED"] == [6]
    caller.socket.close()
    assert caller.executor.close(SECONDS)
