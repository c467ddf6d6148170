"""A worker on this host without gRPC: packets on a unix socket, large tensors in memory that both map.

The memory is this gateway's: it alone says which bytes are in use, for calls and for their results, so a worker that
dies or lies leaves nothing to clean up. Opened on the I/O thread; after that only the engine's thread uses it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from torch import Tensor

from consilium.errors import ConsiliumError, ExpertUnavailable, WireError
from consilium.frames import PROTOCOL_VERSION, Frame, encode_call, shared_bytes
from consilium.local_socket import INLINE, PACKET, new_socket, send_with_descriptor, socket_address
from consilium.rpc import from_call_error
from consilium.shared_memory import Regions, SharedMemory
from consilium.wire import element_bytes
from gateway.dispatcher import Reply
from gateway.mailbox import Completion, Mailbox
from protos.expert.v1 import expert_pb2

WELCOME_SECONDS = 5.0


@dataclass(slots=True)
class _Pending:
    completion: Completion[Reply]
    started: float
    bytes_sent: int
    result_bytes: int
    regions: list[int]


class LocalLink:
    """Calls in flight to one worker."""

    def __init__(self, link: socket.socket, memory: SharedMemory, row_bytes: int, mailbox: Mailbox) -> None:
        """``row_bytes`` is the size of one row of a result."""
        self._socket, self._memory, self._row_bytes, self._mailbox = link, memory, row_bytes, mailbox
        self._regions = Regions(memory.size)
        self._pending: dict[int, _Pending] = {}
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
        regions: list[int] = []
        try:
            call = encode_call(frame, call_id, milliseconds, lambda tensor: self._place(tensor, regions))
            result_bytes = frame.indices.numel() * self._row_bytes
            if result_bytes > INLINE:
                call.result_offset = self._take(result_bytes, regions)[0]
        except MemoryError:
            self._free(regions)
            return False
        packet = expert_pb2.ForwardRequest(call=call).SerializeToString()
        sent = len(packet) + shared_bytes(call)
        self._pending[call_id] = _Pending(completion, time.monotonic(), sent, result_bytes, regions)
        try:
            self._socket.send(packet)
        except OSError as error:  # gone, or it hangs and does not read
            self.lose(ExpertUnavailable(f"its local socket takes nothing: {error.strerror}"))
        return True

    def give_up(self, call_id: int) -> bool:
        """Whether the call was still open. It may hang, and still write into its regions: the link is lost."""
        if call_id not in self._pending:
            return False
        self.lose(ExpertUnavailable("did not answer in time"))
        return True

    def lose(self, error: ConsiliumError) -> None:
        """Close the link; every call on it fails with ``error``."""
        if self.open:
            self._mailbox.unwatch(self._socket.fileno())
            self._socket.close()
            pending, self._pending = self._pending, {}
            for each in pending.values():
                each.completion.settle(error)
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
                self._finish(expert_pb2.ForwardResponse.FromString(bytes(self._buffer[:count])), count)
            except DecodeError:
                self.lose(ExpertUnavailable("what came on its local socket is no ForwardResponse"))

    def _finish(self, response: expert_pb2.ForwardResponse, size: int) -> None:
        pending = self._pending.pop(response.call_id, None)
        if pending is None:
            return
        if response.WhichOneof("outcome") != "result":
            self._free(pending.regions)
            error = from_call_error(response.error)
            pending.completion.settle(error)
            if response.error.code == ExpertUnavailable.grpc_code:
                self.on_unavailable(error)
            return
        received = size + (pending.result_bytes if response.result.rows.HasField("offset") else 0)
        seconds = time.monotonic() - pending.started
        regions = pending.regions
        reply = Reply(response.result, seconds, pending.bytes_sent, received, self._memory, lambda: self._free(regions))
        pending.completion.settle(reply)

    def _place(self, tensor: Tensor, regions: list[int]) -> int | None:
        if tensor.nbytes <= INLINE:
            return None
        offset, target = self._take(tensor.nbytes, regions)
        target.copy_(element_bytes(tensor))
        return offset

    def _take(self, size: int, regions: list[int]) -> tuple[int, Tensor]:
        """Raises MemoryError when there is no gap for so much."""
        offset = self._regions.take(size)
        if offset is None:
            raise MemoryError
        regions.append(offset)
        return offset, self._memory.view(offset, size, "region")

    def _free(self, regions: list[int]) -> None:
        for offset in regions:
            self._regions.free(offset)


async def open_link(names: Sequence[str], worker_id: str, size: int, row_bytes: int, mailbox: Mailbox) -> LocalLink:
    """A link over the first of the worker's sockets that can be reached, with ``size`` bytes of memory.

    Raises ExpertUnavailable that says why there is none.
    """
    reasons = []
    for name in names:
        link = new_socket()
        try:
            link.connect(socket_address(name))
            return await _greet(link, worker_id, size, row_bytes, mailbox)
        except (OSError, TimeoutError, WireError) as error:
            link.close()
            reasons.append(f"{name}: {getattr(error, 'strerror', None) or error or 'no answer'}")
    raise ExpertUnavailable("; ".join(reasons) or "it offers no local socket")


async def _greet(link: socket.socket, worker_id: str, size: int, row_bytes: int, mailbox: Mailbox) -> LocalLink:
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
    return LocalLink(link, memory, row_bytes, mailbox)
