"""Tensors as raw little-endian bytes with dtype and shape, checked before anything is allocated.

The bytes are in the message, or attached to it. Decoded tensors are views of them: read-only ones of the message's,
which are taken out of it once.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from consilium.errors import WireError
from protos.tensor.v1 import tensor_pb2

if sys.byteorder != "little":
    raise ImportError("Consilium's wire format is little-endian and this machine is not")

WIRE_DTYPES = {
    torch.float32: tensor_pb2.DTYPE_FLOAT32,
    torch.bfloat16: tensor_pb2.DTYPE_BFLOAT16,
    torch.int8: tensor_pb2.DTYPE_INT8,
    torch.int32: tensor_pb2.DTYPE_INT32,
}
TORCH_DTYPES = {code: dtype for dtype, code in WIRE_DTYPES.items()}

MOST_SIZES = 4  # in a shape; the product of as many as a message can hold would take hours

# Puts a tensor's bytes beside the message, and says at which offset; None when they go into it.
Place = Callable[[Tensor], int | None]


class Memory(Protocol):
    """Where the bytes of tensors lie that are not in their message."""

    def view(self, offset: int, size: int, name: str) -> Tensor:
        """uint8 [size] at ``offset``. Raises WireError that names the field ``name`` when that is not all inside."""
        ...


# What the configuration's `dtype` means.
ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Received bytes are immutable and our tensors over them are never written to; torch warns once a process.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def encode_tensor(tensor: Tensor, place: Place | None = None) -> tensor_pb2.Tensor:
    """The message for ``tensor``; the elements go where ``place`` says, if it says anything.

    Raises WireError for a dtype that does not travel.
    """
    code = WIRE_DTYPES.get(tensor.dtype)
    if code is None:
        raise WireError(f"a {tensor.dtype} tensor does not travel; convert it to one of {list(WIRE_DTYPES)}")
    offset = None if place is None else place(tensor)
    if offset is None:
        data = element_bytes(tensor).numpy().tobytes()
        return tensor_pb2.Tensor(dtype=code, shape=tensor.shape, data=data)
    return tensor_pb2.Tensor(dtype=code, shape=tensor.shape, offset=offset)


def element_bytes(tensor: Tensor) -> Tensor:
    """uint8 [size]: the elements in row-major order; a view where they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def decode_tensor(
    message: tensor_pb2.Tensor,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    memory: Memory | None = None,
) -> Tensor:
    """A view of the message's bytes as the ``dtype`` and ``shape`` expected; None stands for any length.

    With ``memory`` the bytes may lie there.
    Raises WireError that names the field ``name``, what was expected and what was found.
    """
    if message.dtype != WIRE_DTYPES[dtype]:
        raise WireError(f"{name}: expected {dtype}, found {_dtype_name(message.dtype)}")
    found = tuple(message.shape)
    if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise WireError(f"{name}: expected shape [{wanted}], found {list(found[:16])}")
    size = math.prod(found) * dtype.itemsize
    if message.HasField("offset"):
        if memory is None:
            raise WireError(f"{name}: its bytes lie beside the message, and nothing is there")
        return memory.view(message.offset, size, name).view(dtype).view(found)
    data = message.data  # once: protobuf copies the bytes at every access
    if len(data) != size:
        raise WireError(f"{name}: {list(found)} {dtype} takes {size} bytes, found {len(data)}")
    if size == 0:
        return _empty(name, dtype, found)
    return torch.frombuffer(data, dtype=dtype).view(found)


def nbytes(message: tensor_pb2.Tensor) -> int:
    """Bytes of the elements by the message's own account, wherever they lie; nothing of it is checked."""
    if not message.HasField("offset"):
        return len(message.data)
    dtype = TORCH_DTYPES.get(message.dtype)
    if dtype is None or len(message.shape) > MOST_SIZES:  # no tensor is like that: decoding refuses it
        return 0
    return math.prod(message.shape) * dtype.itemsize


def _empty(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor without elements; its other lengths may still be a lie that torch cannot hold."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError:
        raise WireError(f"{name}: shape {list(shape)} is too large") from None


def _dtype_name(code: int) -> str:
    return str(TORCH_DTYPES.get(tensor_pb2.Dtype.ValueType(code), f"unknown dtype {code}"))
