"""The bytes of tensors behind the message that describes them, so that protobuf's library never copies them.

A packed message is the protobuf message that its .proto file says, with the bytes of its tensors as its last field,
`attachment`, at a multiple of 16 bytes. Writing it copies the bytes once, and reading it not at all: the tensors are
views. Messages from elsewhere, with fields in another order or tensors in `data`, are read, too.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from consilium.errors import WireError
from consilium.wire import element_bytes
from protos.expert.v1 import expert_pb2

ALIGNMENT = 16
_PADDING, _ATTACHMENT = b"\x72", b"\x7a"  # keys of the fields 14 and 15, of bytes
_VARINT, _LENGTH_DELIMITED = 0, 2  # protobuf's wire types
_LONGEST_VARINT = 10

Message = TypeVar("Message", expert_pb2.ForwardRequest, expert_pb2.ForwardResponse)


class Parts:
    """Tensors of a message in the making, which refers to them by their offsets."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[object] = []

    def place(self, tensor: Tensor) -> int | None:
        """The offset of ``tensor``, whose bytes must not change until they are packed; None when it has none."""
        if not tensor.nbytes:
            return None
        gap = -self.size % ALIGNMENT
        if gap:
            self._parts.append(bytes(gap))
        offset = self.size + gap
        self._parts.append(element_bytes(tensor).numpy())
        self.size = offset + tensor.nbytes
        return offset

    def pack(self, message: expert_pb2.ForwardRequest | expert_pb2.ForwardResponse) -> bytes:
        """``message`` as it travels, with the parts attached."""
        head = message.SerializeToString()
        if not self.size:
            return head
        begin = _ATTACHMENT + _to_varint(self.size)
        gap = -(len(head) + len(begin)) % ALIGNMENT
        if gap == 1:  # a field takes two bytes at least
            gap += ALIGNMENT
        padding = _PADDING + bytes([gap - 2]) + bytes(gap - 2) if gap else b""
        return b"".join((head, padding, begin, *self._parts))  # type: ignore[arg-type]  # arrays are buffers


class Attachment:
    """The attached bytes of a message that has come; nobody changes them."""

    def __init__(self, data: bytes, begin: int = 0) -> None:
        """All of ``data`` from ``begin`` on."""
        self._data, self._begin = data, begin
        self.size = len(data) - begin

    def view(self, offset: int, size: int, name: str) -> Tensor:
        """uint8 [size] at ``offset``. Raises WireError when that is not all inside."""
        if offset + size > self.size:
            raise WireError(f"{name}: {size} bytes at {offset} do not lie in the {self.size} bytes attached")
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        found = torch.frombuffer(self._data, dtype=torch.uint8, count=size, offset=self._begin + offset)
        return found if found.data_ptr() % ALIGNMENT == 0 else found.clone()


def unpack(kind: type[Message], data: bytes) -> tuple[Message, Attachment | None]:
    """A message of ``kind`` with what is attached to it. Raises DecodeError when ``data`` is none."""
    begin = _find_attachment(data)
    if begin is not None:
        head, attached = begin
        return kind.FromString(data[:head]), Attachment(data, attached)
    message = kind.FromString(data)
    return message, Attachment(message.attachment) if message.attachment else None


def _find_attachment(data: bytes) -> tuple[int, int] | None:
    """Where the last field begins, and its bytes, if it is an attachment; None leaves the message to protobuf."""
    position = 0
    try:
        while position < len(data):
            field = position
            key, position = _from_varint(data, position)
            value, position = _from_varint(data, position)
            if key == _ATTACHMENT[0]:
                return (field, position) if position + value == len(data) else None
            if key & 7 == _LENGTH_DELIMITED:
                position += value
            elif key & 7 != _VARINT:
                return None
    except IndexError:  # the data end in the middle of a number
        return None
    return None


def _to_varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _from_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and where it ends. Raises IndexError when it does not end."""
    value = 0
    for shift in range(0, 7 * _LONGEST_VARINT, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError
