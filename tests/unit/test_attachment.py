"""Packed messages: protobuf reads them as they are, tensors come back as they were, and lies are WireErrors."""

from __future__ import annotations

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.attachment import ALIGNMENT, Attachment, Parts, unpack
from consilium.errors import WireError
from consilium.frames import Frame, decode_call, decode_result, encode_call, encode_result
from protos.expert.v1 import expert_pb2
from tests.unit.test_frames import HIDDEN, equal, frames

Request, Response = expert_pb2.ForwardRequest, expert_pb2.ForwardResponse


def packed(frame: Frame, call_id: int = 1) -> bytes:
    parts = Parts()
    call = encode_call(frame, call_id, 250, parts.place)
    return parts.pack(Request(call=call))


def a_frame() -> Frame:
    indices = torch.tensor([0, 2, 1], dtype=torch.int32)
    return Frame(1, torch.ones(3, HIDDEN, dtype=torch.int8), torch.ones(3), [2, 5], [0, 2, 3], indices)


@given(frames(), st.integers(0, 2**64 - 1))
def test_a_call_round_trips(frame: Frame, call_id: int) -> None:
    data = packed(frame, call_id)
    request, attachment = unpack(Request, data)
    assert (request.call.call_id, request.attachment) == (call_id, b"")
    assert equal(decode_call(request.call, HIDDEN, frame.rows.dtype, attachment), frame)


@given(frames(), st.booleans())
def test_it_is_the_message_that_the_proto_file_says(frame: Frame, attachment_first: bool) -> None:
    """Read and written again by protobuf itself, which may put the attachment anywhere."""
    whole = Request.FromString(packed(frame))
    again = whole.SerializeToString()
    if attachment_first:
        again = Request(attachment=whole.attachment).SerializeToString() + Request(call=whole.call).SerializeToString()
    request, attachment = unpack(Request, again)
    assert equal(decode_call(request.call, HIDDEN, frame.rows.dtype, attachment), frame)


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.sampled_from([torch.bfloat16, torch.float32]))
def test_rows_lie_at_multiples_and_are_not_copied(call_id: int, pairs: int, dtype: torch.dtype) -> None:
    rows, parts = torch.rand(pairs, HIDDEN).to(dtype), Parts()
    data = parts.pack(Response(call_id=call_id, result=encode_result(rows, 1, 2, place=parts.place)))
    response, attachment = unpack(Response, data)
    found = decode_result(response.result, pairs, HIDDEN, dtype, attachment)
    assert found.equal(rows)
    assert found.data_ptr() % ALIGNMENT == 0
    bytes_at = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
    assert bytes_at < found.data_ptr() < bytes_at + len(data)


def test_elements_at_odd_places_are_read_all_the_same() -> None:
    rows = torch.rand(3)
    for odd in range(1, ALIGNMENT):
        found = Attachment(bytes(odd) + rows.numpy().tobytes()).view(odd, 12, "rows").view(torch.float32)
        assert found.equal(rows)
        assert found.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("rows", {"offset": 10_000}),
        ("rows", {"offset": 2**64 - 1}),
        ("rows", {"shape": [2**32 - 1, HIDDEN]}),
        ("rows", {"shape": [HIDDEN, 3]}),
        ("scales", {"offset": 2**63}),
        ("indices", {"offset": 60}),
        ("indices", {"shape": [2**31]}),
    ],
)
def test_a_place_that_is_none_names_the_field(field: str, change: dict[str, object]) -> None:
    request, attachment = unpack(Request, packed(a_frame()))
    tensor = getattr(request.call, field)
    for name, value in change.items():
        if name == "shape":
            tensor.shape[:] = value
        else:
            tensor.offset = value
    with pytest.raises(WireError, match=f"^{field}: "):
        decode_call(request.call, HIDDEN, torch.int8, attachment)


def test_an_offset_without_an_attachment_is_refused() -> None:
    request, _ = unpack(Request, packed(a_frame()))
    with pytest.raises(WireError, match=r"^rows: .* nothing is there"):
        decode_call(request.call, HIDDEN, torch.int8, None)


def check(data: bytes) -> None:
    """Bytes are no message at all, a WireError, or a frame that can be computed."""
    try:
        request, attachment = unpack(Request, data)
        frame = decode_call(request.call, HIDDEN, torch.int8, attachment)
    except (DecodeError, WireError):
        return
    assert frame.scales is not None
    assert frame.rows[frame.indices.long()].shape == (frame.indices.numel(), HIDDEN)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    check(data)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_and_any_cut(data: st.DataObject) -> None:
    sent = bytearray(packed(a_frame()))
    for _ in range(data.draw(st.integers(0, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(sent[: data.draw(st.integers(0, len(sent)))]))


@given(st.binary(max_size=12))
def test_both_ways_to_read_agree(tail: bytes) -> None:
    """What protobuf makes of the bytes is what is made of them here."""
    data = packed(a_frame()) + tail
    try:
        expected = Request.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            unpack(Request, data)
        return
    request, attachment = unpack(Request, data)
    assert request.call == expected.call
    found = b"" if attachment is None else attachment.view(0, attachment.size, "all").numpy().tobytes()
    assert found == expected.attachment
