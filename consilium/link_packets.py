"""The packets of a local link that is open: fixed numbers, for protobuf and its tensors cost more than the socket.

A call is one packet, and one block of the shared memory with everything else of it: the numbers that say which expert
computes which rows, the rows with their scales, and room for the rows of the result. Both ends know from Describe how
large a row is, so counts are all that the packet has to say. The answer is a packet, too: the rows are in the block.

Letters: U distinct token rows, M experts, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import torch

from consilium.errors import WireError
from consilium.frames import Frame, check_order
from consilium.shared_memory import ALIGNMENT, SharedMemory

# The first byte of a packet.
CALL, CANCEL, RESULT, ERROR, ARENA, STEP = 1, 2, 3, 4, 5, 6

# All little-endian. CALL: kind, 1 when rows of prompts are among them, layer, call id, where the block begins, U, M, P,
# and how many ms the answer is of use (0: for ever). CANCEL: kind, call id. RESULT: kind, call id, µs in the queue, µs
# of computing. ERROR: kind, call id, and then an expert.v1.CallError as protobuf writes it. ARENA: kind, its number
# among the arena's workers, ms that one side waits for the other, call id, the memory's handle, the shape (both as
# consilium.gpu has them). STEP: kind, tokens, what its words begin at, call id. Both are answered like calls.
_CALL = struct.Struct("<BBxxIQQIIII")
_CANCEL = struct.Struct("<BxxxxxxxQ")
_RESULT = struct.Struct("<BxxxxxxxQII")
_ERROR = struct.Struct("<BxxxxxxxQ")
_ARENA = struct.Struct("<BBxxIQ64s32s")
_STEP = struct.Struct("<BxxxIiQ")

# Of the packets that a worker takes.
LENGTHS = {CALL: _CALL.size, CANCEL: _CANCEL.size, ARENA: _ARENA.size, STEP: _STEP.size}


class RowFormat(NamedTuple):
    """The rows of a worker's calls and results."""

    hidden_size: int
    rows: torch.dtype  # int8 rows have scales
    replies: torch.dtype

    @property
    def scaled(self) -> bool:
        return self.rows is torch.int8

    def check(self, frame: Frame) -> None:
        """Raises WireError for a frame of other rows: copying would convert or repeat them without a word."""
        scaled, found = frame.scales is not None, frame.rows
        if (found.dtype, found.shape[1:], scaled) != (self.rows, (self.hidden_size,), self.scaled):
            raise WireError(
                f"rows: expected [any, {self.hidden_size}] {self.rows} {'with' if self.scaled else 'without'} scales, "
                f"found {list(found.shape)} {found.dtype} {'with' if scaled else 'without'}"
            )


class CallPacket(NamedTuple):
    """A call's packet; nothing of it is checked."""

    prefill: bool
    layer: int
    call_id: int
    begin: int
    rows: int  # U
    experts: int  # M
    pairs: int  # P
    deadline_ms: int

    def pack(self) -> bytes:
        return _CALL.pack(CALL, *self)

    @classmethod
    def unpack(cls, packet: memoryview) -> CallPacket:
        _, prefill, *numbers = _CALL.unpack(packet)
        return cls(bool(prefill), *numbers)


class ArenaPacket(NamedTuple):
    """Asks the worker to map an arena on a device, and to be ready for its steps; the one before is let go."""

    worker: int
    milliseconds: int
    call_id: int
    handle: bytes
    shape: bytes

    def pack(self) -> bytes:
        return _ARENA.pack(ARENA, *self)

    @classmethod
    def unpack(cls, packet: memoryview) -> ArenaPacket:
        return cls(*_ARENA.unpack(packet)[1:])


class StepPacket(NamedTuple):
    """Asks the worker to compute its pairs of every layer, each as soon as the gateway's flag says that it is there."""

    tokens: int
    base: int
    call_id: int

    def pack(self) -> bytes:
        return _STEP.pack(STEP, *self)

    @classmethod
    def unpack(cls, packet: memoryview) -> StepPacket:
        return cls(*_STEP.unpack(packet)[1:])


class Block:
    """Where the parts of a call's block lie, as bytes of the memory, each at a multiple of ALIGNMENT."""

    __slots__ = ("begin", "end", "result", "rows", "scales")

    def __init__(self, begin: int, rows: int, experts: int, pairs: int, form: RowFormat) -> None:
        self.begin = begin  # int32: experts [M], then offsets [M + 1], then indices [P]
        self.scales = _aligned(begin + 4 * (2 * experts + 1 + pairs))  # float32 [U], if rows are scaled
        self.rows = _aligned(self.scales + 4 * rows) if form.scaled else self.scales  # [U, D]
        self.result = _aligned(self.rows + rows * form.hidden_size * form.rows.itemsize)  # [P, D]
        self.end = self.result + pairs * form.hidden_size * form.replies.itemsize

    def write(self, frame: Frame, form: RowFormat, memory: SharedMemory) -> None:
        """Everything of ``frame``, which is of this form."""
        experts, pairs = len(frame.experts), frame.indices.numel()
        numbers = memory.array((2 * experts + 1 + pairs,), np.int32, self.begin)
        numbers[:experts] = frame.experts
        numbers[experts : 2 * experts + 1] = frame.offsets
        numbers[2 * experts + 1 :] = frame.indices.numpy()
        if frame.scales is not None:
            memory.array((len(frame.scales),), np.float32, self.scales)[:] = frame.scales.numpy()
        memory.tensor((len(frame.rows), form.hidden_size), form.rows, self.rows).copy_(frame.rows)

    def read(self, packet: CallPacket, form: RowFormat, memory: SharedMemory) -> Frame:
        """The frame, in order; rows and scales stay where they are, and their sender may still change them.

        The block must be all inside the memory. Raises WireError that names what is wrong.
        """
        middle = 2 * packet.experts + 1
        # Copied: what has been checked must not change any more.
        numbers = memory.array((middle + packet.pairs,), np.int32, self.begin).copy()
        experts, offsets = numbers[: packet.experts], numbers[packet.experts : middle]
        indices = torch.from_numpy(numbers[middle:])
        frame = Frame(
            packet.layer,
            memory.tensor((packet.rows, form.hidden_size), form.rows, self.rows),
            memory.tensor((packet.rows,), torch.float32, self.scales) if form.scaled else None,
            experts.tolist(),
            offsets.tolist(),
            indices,
            packet.prefill,
        )
        check_order(frame)
        return frame


def pack_cancel(call_id: int) -> bytes:
    """Nobody wants the answer any more."""
    return _CANCEL.pack(CANCEL, call_id)


def unpack_cancel(packet: memoryview) -> int:
    """The call's id."""
    return int(_CANCEL.unpack(packet)[1])


def pack_result(call_id: int, queue_us: int, compute_us: int) -> bytes:
    """The rows are in the call's block."""
    return _RESULT.pack(RESULT, call_id, queue_us, compute_us)


def unpack_result(packet: memoryview) -> tuple[int, int, int]:
    """Call id, µs in the queue, µs of computing."""
    _, call_id, queue_us, compute_us = _RESULT.unpack(packet)
    return call_id, queue_us, compute_us


def pack_error(call_id: int, error: bytes) -> bytes:
    """``error`` is a CallError's bytes."""
    return _ERROR.pack(ERROR, call_id) + error


def unpack_error(packet: memoryview) -> tuple[int, bytes]:
    """Call id, and a CallError's bytes. Raises struct.error for a packet that is cut off."""
    return int(_ERROR.unpack_from(packet)[1]), bytes(packet[_ERROR.size :])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
