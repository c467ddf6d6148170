"""A call is the same whichever way it came, and says of itself no more than can be checked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.attachment import Parts, unpack
from consilium.errors import StalePlacement, WireError
from consilium.frames import Frame, encode_call
from consilium.link_packets import CallPacket, RowFormat
from expert_service.calls import Call, MessageCall, SharedCall
from protos.expert.v1 import expert_pb2
from protos.tensor.v1 import tensor_pb2
from tests.links import block_of, packet_of, place, result_rows, shared_memory
from tests.unit.test_frames import HIDDEN, equal, frames

SIZE = 2**12
MOST = 2**32 - 1
FORM = RowFormat(HIDDEN, torch.float32, torch.bfloat16)
FRAME = Frame(3, torch.rand(4, HIDDEN), None, [2, 5], [0, 2, 3], torch.tensor([0, 3, 1], dtype=torch.int32))


def attached(frame: Frame, deadline_ms: int = 0) -> MessageCall:
    parts = Parts()
    data = parts.pack(expert_pb2.ForwardRequest(call=encode_call(frame, 1, deadline_ms, parts.place)))
    request, attachment = unpack(expert_pb2.ForwardRequest, data)
    return MessageCall(request.call, attachment)


@given(frames(last_expert=2**31 - 1, fewest=1))
def test_the_same_frame_comes_every_way(frame: Frame) -> None:
    form = RowFormat(HIDDEN, frame.rows.dtype, torch.bfloat16)
    memory, theirs = shared_memory(SIZE)
    packet = place(frame, form, memory)._replace(deadline_ms=250)
    calls: list[Call] = [
        MessageCall(encode_call(frame, 1, 250)),
        attached(frame, 250),
        SharedCall(packet, theirs, form),
    ]
    for call in calls:
        assert (call.layer, call.deadline_ms, call.prefill) == (frame.layer, 250, frame.prefill)
        assert call.pairs == frame.indices.numel()
        assert list(call.experts) == frame.experts
        assert call.nbytes >= frame.rows.nbytes + frame.indices.nbytes
        assert equal(call.frame(form), frame)
        room = call.room(form)
        assert (room.shape, room.dtype) == ((frame.indices.numel(), HIDDEN), torch.bfloat16)


def test_what_is_written_into_the_room_of_a_shared_call_is_its_result() -> None:
    memory, theirs = shared_memory(SIZE)
    packet = place(FRAME, FORM, memory, begin=128)
    call = SharedCall(packet, theirs, FORM)
    call.frame(FORM)
    call.room(FORM)[:] = 3
    assert result_rows(packet, FORM, memory).eq(3).all()
    assert equal(call.frame(FORM), FRAME), "and spoils nothing else"


def test_bytes_are_those_of_the_call_without_its_result() -> None:
    memory, theirs = shared_memory(SIZE)
    block = block_of(packet_of(FRAME), FORM)
    assert SharedCall(place(FRAME, FORM, memory, begin=128), theirs, FORM).nbytes == block.result
    message = encode_call(FRAME, 1)
    assert MessageCall(message).nbytes == message.ByteSize()
    assert attached(FRAME).nbytes > FRAME.rows.nbytes


@given(st.tuples(*[st.integers(0, MOST)] * 3), st.integers(0, 2**64 - 1))
def test_counts_that_lie_are_numbers_and_never_memory(counts: tuple[int, int, int], begin: int) -> None:
    _, memory = shared_memory(SIZE)
    packet = CallPacket(False, 1, 1, begin, *counts, 0)
    if packet.experts > packet.pairs or begin % 64 or block_of(packet, FORM).end > SIZE:
        with pytest.raises(WireError, match=r"do not lie in the shared memory of 4096 bytes|leave out"):
            SharedCall(packet, memory, FORM)
        return
    assert SharedCall(packet, memory, FORM).pairs == packet.pairs


@pytest.mark.parametrize("shape", [[2**31], [MOST] * 4, [MOST] * 100_000])
def test_shapes_that_lie_are_numbers_and_never_memory(shape: list[int]) -> None:
    message = encode_call(FRAME, 1)
    message.indices.CopyFrom(tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT32, shape=shape, offset=0))
    call = MessageCall(message)
    assert call.pairs in {2**31, MOST**4, 0}
    with pytest.raises(WireError, match=r"^indices: "):
        call.frame(FORM)


def test_a_class_that_is_not_said_counts_as_decode() -> None:
    kinds = expert_pb2.TRAFFIC_CLASS_UNSPECIFIED, expert_pb2.TRAFFIC_CLASS_DECODE, expert_pb2.TRAFFIC_CLASS_PREFILL
    assert [MessageCall(expert_pb2.Call(traffic_class=kind)).prefill for kind in kinds] == [False, False, True]


def test_a_weight_version_that_is_not_here() -> None:
    message = encode_call(FRAME, 1)
    message.weight_version = "x"
    with pytest.raises(StalePlacement, match="no weight version 'x'; leave the field empty"):
        MessageCall(message).frame(FORM)


def test_experts_that_change_while_a_call_waits() -> None:
    """What the queue sees of them decides who is computed together, and nothing else."""
    memory, theirs = shared_memory(SIZE)
    packet = place(FRAME, FORM, memory)
    call = SharedCall(packet, theirs, FORM)
    memory.array((2,), "int32", 0)[:] = (-7, 2**31 - 1)
    assert list(call.experts) == [-7, 2**31 - 1]
    place(FRAME, FORM, memory)
    assert equal(call.frame(FORM), FRAME)
