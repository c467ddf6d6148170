"""Tensors on the wire: any tensor comes back as it was, and a header that lies is a WireError with the field's name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.errors import WireError
from consilium.wire import WIRE_DTYPES, decode_tensor, encode_tensor
from protos.tensor.v1 import tensor_pb2

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensor_of(data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Any bit pattern at all, NaNs included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    pattern = data.draw(st.binary(min_size=size, max_size=size))
    return (
        torch.frombuffer(bytearray(pattern), dtype=torch.uint8).view(dtype).view(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


@given(st.data(), st.sampled_from(list(WIRE_DTYPES)), SHAPES)
def test_round_trip(data: st.DataObject, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(data, dtype, shape)
    sent = encode_tensor(tensor).SerializeToString()
    received = decode_tensor(tensor_pb2.Tensor.FromString(sent), "rows", dtype, (None,) * len(shape))
    assert (received.dtype, received.shape, bits(received)) == (dtype, tensor.shape, bits(tensor))


def test_a_tensor_that_is_not_contiguous_travels_in_row_major_order() -> None:
    tensor = torch.arange(12, dtype=torch.int32).view(3, 4)
    assert decode_tensor(encode_tensor(tensor.t()[1:]), "rows", torch.int32, (3, 3)).equal(tensor.t()[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.float16])
def test_other_dtypes_do_not_travel(dtype: torch.dtype) -> None:
    with pytest.raises(WireError, match=str(dtype)):
        encode_tensor(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": tensor_pb2.DTYPE_UNSPECIFIED}, "expected torch.float32, found unknown dtype 0"),
        ({"dtype": tensor_pb2.DTYPE_INT32}, "expected torch.float32, found torch.int32"),
        ({"dtype": 77}, "unknown dtype 77"),
        ({"dtype": -1}, "unknown dtype -1"),
        ({"shape": []}, r"expected shape \[any, 3\], found \[\]"),
        ({"shape": [2]}, "expected shape"),
        ({"shape": [1] * 10**6}, r"found \[1(, 1){15}\]$"),
        ({"shape": [2, 3, 1]}, "expected shape"),
        ({"shape": [3, 2]}, "expected shape"),
        ({"shape": [3, 3]}, "takes 36 bytes, found 24"),
        ({"shape": [2**32 - 1, 3]}, "takes 51539607540 bytes, found 24"),
        ({"data": b""}, "takes 24 bytes, found 0"),
        ({"data": bytes(23)}, "takes 24 bytes, found 23"),
        ({"data": bytes(25)}, "takes 24 bytes, found 25"),
    ],
)
def test_a_lie_in_the_header_names_the_field(change: dict[str, object], said: str) -> None:
    message = encode_tensor(torch.zeros(2, 3))
    for field in change:
        message.ClearField(field)  # type: ignore[arg-type]  # the names come from the table above
    message.MergeFrom(tensor_pb2.Tensor(**change))  # type: ignore[arg-type]
    with pytest.raises(WireError, match=f"^rows: .*{said}"):
        decode_tensor(message, "rows", torch.float32, (None, 3))


def test_a_shape_that_torch_cannot_hold_is_refused() -> None:
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT8, shape=[*[2**32 - 1] * 3, 0])
    with pytest.raises(WireError, match=r"^rows: shape .* is too large"):
        decode_tensor(message, "rows", torch.int8, (None,) * 4)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=5), st.integers(0, 64), st.sampled_from(list(WIRE_DTYPES)))
def test_no_shape_overflows(shape: list[int], size: int, dtype: torch.dtype) -> None:
    message = tensor_pb2.Tensor(dtype=WIRE_DTYPES[dtype], shape=shape, data=bytes(size))
    try:
        tensor = decode_tensor(message, "rows", dtype, (None,) * len(shape))
    except WireError:
        return
    assert (list(tensor.shape), tensor.numel() * dtype.itemsize) == (shape, size)
