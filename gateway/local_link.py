"""A worker on this host without gRPC: packets on a unix socket, tensors in memory that both map.

The memory is this gateway's: it alone says which bytes are in use, for calls and for their results, so a worker that
dies or lies leaves nothing to clean up. Opened on the I/O thread; after that only the engine's thread uses it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from consilium.errors import ConsiliumError, ExpertUnavailable, WireError
from consilium.frames import PROTOCOL_VERSION, Frame
from consilium.link_packets import (
    ERROR,
    RESULT,
    Block,
    CallPacket,
    RowFormat,
    pack_cancel,
    unpack_error,
    unpack_result,
)
from consilium.local_socket import PACKET, new_socket, send_with_descriptor, socket_address
from consilium.rpc import from_call_error
from consilium.shared_memory import Regions, SharedMemory
from gateway.mailbox import Completion, Mailbox
from gateway.worker import Reply
from protos.expert.v1 import expert_pb2

WELCOME_SECONDS = 5.0


Times = tuple[int, int]  # µs in the worker's queue, and of computing


@dataclass(slots=True)
class _Pending:
    completion: Completion[Reply]
    started: float
    block: Block


class LocalLink:
    """Calls in flight to one worker."""

    def __init__(self, link: socket.socket, memory: SharedMemory, form: RowFormat, mailbox: Mailbox) -> None:
        self._socket, self._memory, self._form, self._mailbox = link, memory, form, mailbox
        self._regions = Regions(memory.size)
        self._pending: dict[int, _Pending] = {}
        self._asked: dict[int, Completion[Times]] = {}
        self._buffer = memoryview(bytearray(PACKET))
        self.on_lost: Callable[[ConsiliumError], None] = lambda _: None
        self.on_unavailable: Callable[[ConsiliumError], None] = lambda _: None

    @property
    def open(self) -> bool:
        return self._socket.fileno() >= 0

    def start(self) -> None:
        """Have answers read from now on."""
        self._mailbox.watch(self._socket.fileno(), self._read)

    def send(self, call_id: int, frame: Frame, milliseconds: int, completion: Completion[Reply]) -> bool:
        """Start a call; False, with nothing done, when the shared memory has no room for it."""
        try:
            self._form.check(frame)
        except WireError as error:  # as the worker would say over gRPC
            completion.settle(error)
            return True
        counts = len(frame.rows), len(frame.experts), frame.indices.numel()
        begin = self._regions.take(Block(0, *counts, self._form).end)
        if begin is None:
            return False
        block = Block(begin, *counts, self._form)
        block.write(frame, self._form, self._memory)
        packet = CallPacket(frame.prefill, frame.layer, call_id, begin, *counts, milliseconds)
        self._pending[call_id] = _Pending(completion, time.monotonic(), block)
        self._send(packet.pack())
        return True

    def ask(self, call_id: int, packet: bytes, completion: Completion[Times]) -> None:
        """Send what is neither a call nor a cancel; its outcome comes like a call's."""
        self._asked[call_id] = completion
        self._send(packet)

    def cancel(self, call_id: int) -> bool:
        """Whether the call is open. The worker is told that nobody wants it, and answers when it leaves its block."""
        if call_id not in self._pending:
            return False
        with suppress(OSError):  # it does not read, or is gone, as others will find out
            self._socket.send(pack_cancel(call_id))
        return True

    def give_up(self, call_id: int) -> bool:
        """Whether the call was still open. It may hang, and still write into its regions: the link is lost."""
        if call_id not in self._pending and call_id not in self._asked:
            return False
        self.lose(ExpertUnavailable("did not answer in time"))
        return True

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except OSError as error:  # gone, or it hangs and does not read
            self.lose(ExpertUnavailable(f"its local socket takes nothing: {error.strerror}"))

    def lose(self, error: ConsiliumError) -> None:
        """Close the link; every call on it fails with ``error``."""
        if self.open:
            self._mailbox.unwatch(self._socket.fileno())
            self._socket.close()
            pending, self._pending = self._pending, {}
            asked, self._asked = self._asked, {}
            for each in pending.values():
                each.completion.settle(error)
            for completion in asked.values():
                completion.settle(error)
            self.on_lost(error)

    def _read(self) -> None:
        while self.open:
            try:
                count = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self.lose(ExpertUnavailable(f"its local socket broke: {error.strerror}"))
                return
            if not count:
                self.lose(ExpertUnavailable("it closed its local socket"))
                return
            try:
                self._take(self._buffer[:count])
            except (DecodeError, struct.error):
                self.lose(ExpertUnavailable("what came on its local socket is no answer"))

    def _take(self, packet: memoryview) -> None:
        """Raises DecodeError, struct.error."""
        if packet[0] == RESULT:
            self._finish(*unpack_result(packet))
        elif packet[0] == ERROR:
            call_id, data = unpack_error(packet)
            self._fail(call_id, expert_pb2.CallError.FromString(data))
        else:
            raise DecodeError

    def _finish(self, call_id: int, queue_us: int, compute_us: int) -> None:
        asked, pending = self._asked.pop(call_id, None), self._pending.pop(call_id, None)
        if asked is not None:
            asked.settle((queue_us, compute_us))
        elif pending is not None:
            block, seconds = pending.block, time.monotonic() - pending.started
            sizes = block.result - block.begin, block.end - block.result
            rows, release = partial(self._rows, block), partial(self._regions.free, block.begin)
            pending.completion.settle(Reply(rows, queue_us, compute_us, seconds, *sizes, release))

    def _fail(self, call_id: int, said: expert_pb2.CallError) -> None:
        asked, pending = self._asked.pop(call_id, None), self._pending.pop(call_id, None)
        if pending is not None:
            self._regions.free(pending.block.begin)
        completion = asked if pending is None else pending.completion
        if completion is not None:
            error = from_call_error(said)
            completion.settle(error)
            if said.code == ExpertUnavailable.grpc_code:
                self.on_unavailable(error)

    def _rows(self, block: Block, pairs: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        """As Reply has it; a worker has nothing to say about them, so only who asks may be wrong."""
        size = pairs * hidden_size * dtype.itemsize
        if (hidden_size, dtype, size) != (self._form.hidden_size, self._form.replies, block.end - block.result):
            raise WireError(
                f"result rows: [{pairs}, {hidden_size}] {dtype} are not the {block.end - block.result} bytes of rows "
                f"[any, {self._form.hidden_size}] {self._form.replies} that the call asked for"
            )
        return self._memory.tensor((pairs, hidden_size), dtype, block.result)


async def open_link(names: Sequence[str], worker_id: str, size: int, form: RowFormat, mailbox: Mailbox) -> LocalLink:
    """A link over the first of the worker's sockets that can be reached, with ``size`` bytes of memory.

    Raises ExpertUnavailable that says why there is none.
    """
    reasons = []
    for name in names:
        link = new_socket()
        try:
            link.connect(socket_address(name))
            return await _greet(link, worker_id, size, form, mailbox)
        except (OSError, TimeoutError, WireError) as error:
            link.close()
            reasons.append(f"{name}: {getattr(error, 'strerror', None) or error or 'no answer'}")
    raise ExpertUnavailable("; ".join(reasons) or "it offers no local socket")


async def _greet(link: socket.socket, worker_id: str, size: int, form: RowFormat, mailbox: Mailbox) -> LocalLink:
    hello = expert_pb2.LinkHello(protocol_version=PROTOCOL_VERSION, worker_id=worker_id)
    memory, descriptor = SharedMemory.create(size)
    try:
        send_with_descriptor(link, hello.SerializeToString(), descriptor)
    finally:
        os.close(descriptor)
    packet = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(link, PACKET), WELCOME_SECONDS)
    if not packet:
        raise WireError("it closed the socket")
    try:
        welcome = expert_pb2.LinkWelcome.FromString(packet)
    except DecodeError:
        raise WireError("its answer is no LinkWelcome") from None
    if welcome.error:
        raise WireError(f"it refuses: {welcome.error}")
    return LocalLink(link, memory, form, mailbox)
