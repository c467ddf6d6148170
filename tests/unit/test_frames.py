"""Frames: a call reads back as it was packed; whatever a peer sends instead is a WireError, never anything else."""

from __future__ import annotations

from itertools import accumulate, chain

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.errors import WireError
from consilium.frames import Frame, decode_call, decode_result, encode_call, encode_result
from consilium.wire import encode_tensor
from protos.expert.v1 import expert_pb2

HIDDEN = 6
ROW_DTYPES = [torch.int8, torch.bfloat16, torch.float32]


@st.composite
def frames(draw: st.DrawFn, last_expert: int = 2**32 - 1, fewest: int = 0) -> Frame:
    """Any frame of U = 0..5 token rows over 0..4 experts, each with ``fewest`` rows at least."""
    dtype, total = draw(st.sampled_from(ROW_DTYPES)), draw(st.integers(0, 5))
    experts = sorted(draw(st.sets(st.integers(0, last_expert), max_size=4 if total >= fewest else 0)))
    rows = st.lists(st.integers(0, total - 1), min_size=fewest, unique=True) if total else st.just([])
    chosen = [draw(rows) for _ in experts]
    torch.manual_seed(draw(st.integers(0, 99)))
    return Frame(
        layer=draw(st.integers(0, 2**32 - 1)),
        rows=torch.randint(-128, 128, (total, HIDDEN)).to(dtype),
        scales=torch.rand(total) if dtype is torch.int8 else None,
        experts=experts,
        offsets=list(accumulate(map(len, chosen), initial=0)),
        indices=torch.tensor(list(chain.from_iterable(chosen)), dtype=torch.int32),
        prefill=draw(st.booleans()),
    )


def equal(one: Frame, other: Frame) -> bool:
    same_scales = one.scales is other.scales is None or (
        one.scales is not None and other.scales is not None and one.scales.equal(other.scales)
    )
    plain = [(frame.layer, frame.experts, frame.offsets, frame.prefill) for frame in (one, other)]
    return plain[0] == plain[1] and same_scales and one.rows.equal(other.rows) and one.indices.equal(other.indices)


@given(frames(), st.integers(0, 2**64 - 1))
def test_a_call_round_trips(frame: Frame, call_id: int) -> None:
    call = expert_pb2.Call.FromString(encode_call(frame, call_id, 250).SerializeToString())
    expected = expert_pb2.TRAFFIC_CLASS_PREFILL if frame.prefill else expert_pb2.TRAFFIC_CLASS_DECODE
    assert (call.call_id, call.deadline_ms, call.traffic_class) == (call_id, 250, expected)
    assert equal(decode_call(call, HIDDEN, frame.rows.dtype), frame)


@given(st.integers(0, 5), st.sampled_from([torch.bfloat16, torch.float32]))
def test_a_result_round_trips(pairs: int, dtype: torch.dtype) -> None:
    rows = torch.rand(pairs, HIDDEN).to(dtype)
    result = expert_pb2.Result.FromString(encode_result(rows, 250_000, 500_000).SerializeToString())
    assert (result.queue_us, result.compute_us) == (250_000, 500_000)
    assert decode_result(result, pairs, HIDDEN, dtype).equal(rows)


@pytest.mark.parametrize(
    ("pairs", "hidden", "dtype"), [(2, HIDDEN, torch.float32), (3, 7, torch.float32), (3, HIDDEN, torch.bfloat16)]
)
def test_a_result_that_was_not_asked_for_is_refused(pairs: int, hidden: int, dtype: torch.dtype) -> None:
    with pytest.raises(WireError, match=r"^result rows: "):
        decode_result(encode_result(torch.rand(3, HIDDEN), 0, 0), pairs, hidden, dtype)


def a_call(dtype: torch.dtype = torch.int8) -> expert_pb2.Call:
    """Three rows; expert 2 computes rows 0 and 2, expert 5 computes row 1."""
    scales = torch.ones(3) if dtype is torch.int8 else None
    indices = torch.tensor([0, 2, 1], dtype=torch.int32)
    return encode_call(Frame(1, torch.ones(3, HIDDEN).to(dtype), scales, [2, 5], [0, 2, 3], indices), call_id=9)


@pytest.mark.parametrize(
    ("field", "lie"),
    [
        ("rows", encode_tensor(torch.ones(3, HIDDEN))),
        ("rows", encode_tensor(torch.ones(3, HIDDEN + 1).to(torch.int8))),
        ("rows", encode_tensor(torch.ones(3 * HIDDEN).to(torch.int8))),
        ("rows", None),
        ("scales", encode_tensor(torch.ones(2))),
        ("scales", encode_tensor(torch.ones(3, 1))),
        ("scales", encode_tensor(torch.ones(3).bfloat16())),
        ("scales", None),
        ("indices", encode_tensor(torch.tensor([0, 3, 1], dtype=torch.int32))),
        ("indices", encode_tensor(torch.tensor([0, -1, 1], dtype=torch.int32))),
        ("indices", encode_tensor(torch.tensor([[0, 2, 1]], dtype=torch.int32))),
        ("indices", encode_tensor(torch.ones(3))),
        ("indices", None),
        ("experts", [5, 2]),
        ("experts", [2, 2]),
        ("offsets", [0, 2]),
        ("offsets", [0, 1, 2, 3]),
        ("offsets", [1, 2, 3]),
        ("offsets", [0, 2, 2]),
        ("offsets", [0, 2, 4]),
        ("offsets", [0, 4, 3]),
        ("offsets", []),
    ],
)
def test_a_lie_in_a_call_names_the_field(field: str, lie: object) -> None:
    call = a_call()
    decode_call(call, HIDDEN, torch.int8)
    call.ClearField(field)  # type: ignore[arg-type]  # the names come from the table above
    call.MergeFrom(expert_pb2.Call(**{field: lie}))  # type: ignore[arg-type]
    with pytest.raises(WireError, match=f"^{field}: "):
        decode_call(call, HIDDEN, torch.int8)


def test_an_expert_computes_a_row_once() -> None:
    call = encode_call(Frame(0, torch.ones(1, HIDDEN), None, [0], [0, 2], torch.zeros(2, dtype=torch.int32)), 1)
    with pytest.raises(WireError, match=r"^offsets: an expert computes a row once"):
        decode_call(call, HIDDEN, torch.float32)


def test_offsets_do_not_fall() -> None:
    call = a_call()
    call.experts.append(7)
    call.offsets[:] = [0, 2, 1, 3]
    with pytest.raises(WireError, match=r"^offsets: must not fall"):
        decode_call(call, HIDDEN, torch.int8)


def test_scales_come_only_with_int8_rows() -> None:
    call = a_call(torch.float32)
    decode_call(call, HIDDEN, torch.float32)
    call.scales.CopyFrom(encode_tensor(torch.ones(3)))
    with pytest.raises(WireError, match=r"^scales: "):
        decode_call(call, HIDDEN, torch.float32)


def check(sent: bytes) -> None:
    """Bytes are no message at all, a WireError, or a frame that can be computed."""
    try:
        frame = decode_call(expert_pb2.Call.FromString(sent), HIDDEN, torch.int8)
    except (DecodeError, WireError):
        return
    assert frame.scales is not None
    assert frame.rows.shape == (frame.scales.shape[0], HIDDEN)
    for first, last in zip(frame.offsets[:-1], frame.offsets[1:], strict=True):
        assert frame.rows[frame.indices[first:last].long()].shape == (last - first, HIDDEN)


@given(st.binary(max_size=200))
def test_any_bytes(sent: bytes) -> None:
    check(sent)


@settings(max_examples=300)
@given(st.data())
def test_any_damage_to_a_call(data: st.DataObject) -> None:
    sent = bytearray(a_call().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    check(bytes(sent[: data.draw(st.integers(0, len(sent)))] if data.draw(st.booleans()) else sent))
