"""Local links in the hands of tests: frames in shared memory, and what either end would say about them."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

from torch import Tensor

from consilium.frames import Frame
from consilium.link_packets import RESULT, Block, CallPacket, RowFormat, unpack_error, unpack_result
from consilium.shared_memory import SharedMemory
from protos.expert.v1 import expert_pb2


class Answer(NamedTuple):
    """What a worker said to a call."""

    call_id: int
    error: str = ""  # code and message; empty for a result


def socket_pair() -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def shared_memory(size: int) -> tuple[SharedMemory, SharedMemory]:
    """One memory as the gateway and as the worker map it."""
    ours, descriptor = SharedMemory.create(size)
    theirs = SharedMemory.attach(descriptor)
    os.close(descriptor)
    return ours, theirs


def packet_of(frame: Frame, call_id: int = 1, begin: int = 0) -> CallPacket:
    """What a gateway would send when the block of ``frame`` lies at ``begin``."""
    counts = len(frame.rows), len(frame.experts), frame.indices.numel()
    return CallPacket(frame.prefill, frame.layer, call_id, begin, *counts, deadline_ms=0)


def block_of(packet: CallPacket, form: RowFormat) -> Block:
    return Block(packet.begin, packet.rows, packet.experts, packet.pairs, form)


def place(frame: Frame, form: RowFormat, memory: SharedMemory, call_id: int = 1, begin: int = 0) -> CallPacket:
    """Write ``frame`` into ``memory``, and return what a gateway would send about it."""
    packet = packet_of(frame, call_id, begin)
    block_of(packet, form).write(frame, form, memory)
    return packet


def result_rows(packet: CallPacket, form: RowFormat, memory: SharedMemory) -> Tensor:
    """A copy of the rows [P, D] of the result."""
    return memory.tensor((packet.pairs, form.hidden_size), form.replies, block_of(packet, form).result).clone()


def read_answer(data: bytes) -> Answer:
    packet = memoryview(data)
    if packet[0] == RESULT:
        return Answer(unpack_result(packet)[0])
    call_id, said = unpack_error(packet)
    error = expert_pb2.CallError.FromString(said)
    return Answer(call_id, f"{error.code}: {error.message}")
