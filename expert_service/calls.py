"""A call as the worker has it, whatever the way it came: over gRPC as a message, or over a local link as a packet.

Letters: P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consilium.attachment import Attachment
from consilium.errors import StalePlacement, WireError
from consilium.frames import Frame, decode_call
from consilium.link_packets import Block, CallPacket, RowFormat
from consilium.shared_memory import SharedMemory
from consilium.wire import nbytes
from protos.expert.v1 import expert_pb2

INDEX_BYTES = torch.int32.itemsize
LONGEST_US = 2**32 - 1  # that a message or packet can say: 71 minutes


@dataclass(frozen=True, slots=True)
class Computed:
    """The output rows [P, D] of a call, and how long it waited and took."""

    rows: Tensor
    queue_us: int  # at most LONGEST_US, as compute_us
    compute_us: int


class Call(Protocol):
    """What is asked for; until :meth:`frame` nothing but its size has been checked."""

    layer: int
    deadline_ms: int  # how long the answer is of use; 0 is for ever
    prefill: bool
    pairs: int  # P by the call's own account
    nbytes: int  # that it takes, without its result

    @property
    def experts(self) -> Iterable[int]:
        """By the call's own account."""
        ...

    def frame(self, form: RowFormat) -> Frame:
        """Raises WireError, StalePlacement."""
        ...

    def room(self, form: RowFormat) -> Tensor:
        """Where the output rows go: [P, D]. For a call whose frame is in order."""
        ...


class MessageCall:
    """A call that came as protobuf, perhaps with its tensors attached."""

    __slots__ = ("_attachment", "_message", "deadline_ms", "layer", "nbytes", "pairs", "prefill")

    def __init__(self, message: expert_pb2.Call, attachment: Attachment | None = None) -> None:
        self._message, self._attachment = message, attachment
        self.layer, self.deadline_ms = message.layer, message.deadline_ms
        self.prefill = message.traffic_class == expert_pb2.TRAFFIC_CLASS_PREFILL
        self.pairs = nbytes(message.indices) // INDEX_BYTES
        self.nbytes = message.ByteSize() + (0 if attachment is None else attachment.size)

    @property
    def experts(self) -> Iterable[int]:
        return self._message.experts

    def frame(self, form: RowFormat) -> Frame:
        version = self._message.weight_version
        if version:
            raise StalePlacement(f"this worker has no weight version {version!r}; leave the field empty")
        return decode_call(self._message, form.hidden_size, form.rows, self._attachment)

    def room(self, form: RowFormat) -> Tensor:
        return torch.empty(self.pairs, form.hidden_size, dtype=form.replies)


class SharedCall:
    """A call that came over a local link, with all but its packet in shared memory."""

    __slots__ = ("_block", "_memory", "_packet", "deadline_ms", "layer", "nbytes", "pairs", "prefill")

    def __init__(self, packet: CallPacket, memory: SharedMemory, form: RowFormat) -> None:
        """Raises WireError when its block is not all inside ``memory``, or has experts without rows."""
        self._packet, self._memory = packet, memory
        self._block = Block(packet.begin, packet.rows, packet.experts, packet.pairs, form)
        memory.check(self._block.begin, self._block.end)
        if packet.experts > packet.pairs:  # else a few bytes of packet make us list millions of them
            raise WireError(f"experts: {packet.experts} for {packet.pairs} rows; leave out those that compute none")
        self.layer, self.deadline_ms, self.prefill = packet.layer, packet.deadline_ms, packet.prefill
        self.pairs, self.nbytes = packet.pairs, self._block.result - packet.begin

    @property
    def experts(self) -> Iterable[int]:
        """As they are at the moment: the caller may still change them."""
        found: list[int] = self._memory.array((self._packet.experts,), np.int32, self._block.begin).tolist()
        return found

    def frame(self, form: RowFormat) -> Frame:
        return self._block.read(self._packet, form, self._memory)

    def room(self, form: RowFormat) -> Tensor:
        return self._memory.tensor((self.pairs, form.hidden_size), form.replies, self._block.result)
