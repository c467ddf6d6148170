"""A Forward stream to a worker over a gRPC channel, with the calls in flight on it. Runs on the I/O thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc
from google.protobuf.message import DecodeError

from consilium.attachment import unpack
from consilium.errors import ConsiliumError, ExpertUnavailable
from consilium.frames import decode_result
from consilium.rpc import from_call_error
from consilium.tokens import Metadata
from gateway.mailbox import Completion, Mailbox
from gateway.worker import Reply
from protos.expert.v1 import expert_pb2

_METHOD = "/expert.v1.ExpertService/Forward"


@dataclass(slots=True)
class _Pending:
    completion: Completion[Reply]
    started: float
    bytes_sent: int


class ForwardStream:
    """Opened when made; answers come in whatever order they are done."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        mailbox: Mailbox,
        on_unavailable: Callable[[ConsiliumError], None],
        metadata: Metadata = (),
    ) -> None:
        """``on_unavailable`` is told when the worker says that it takes no more calls; ``metadata`` says who asks."""
        # Bytes both ways, packed and unpacked here.
        forward: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(_METHOD)
        self._stream = forward(metadata=metadata)
        self._mailbox, self._on_unavailable = mailbox, on_unavailable
        self._pending: dict[int, _Pending] = {}
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()

    def start(self, call_id: int, request: bytes, completion: Completion[Reply]) -> None:
        """Send a call, a ForwardRequest as it travels."""
        self._pending[call_id] = _Pending(completion, time.monotonic(), len(request))
        self._outgoing.put_nowait(request)

    def cancel(self, call_id: int) -> None:
        """Tell the worker that nobody wants a call, if it is open; it is answered all the same, perhaps sooner."""
        if call_id in self._pending:
            request = expert_pb2.ForwardRequest(cancel=expert_pb2.Cancel(call_id=call_id))
            self._outgoing.put_nowait(request.SerializeToString())

    def give_up(self, call_id: int) -> bool:
        """Whether the call was still open; the worker is told that nobody wants it, and what it answers is ignored."""
        self.cancel(call_id)
        return self._pending.pop(call_id, None) is not None

    def fail(self, error: ConsiliumError) -> None:
        """Every call in flight fails with ``error``."""
        pending, self._pending = self._pending, {}
        for each in pending.values():
            self._mailbox.settle(each.completion, error)

    async def run(self) -> None:
        """Pass frames both ways until the worker closes the stream. Raises AioRpcError, ExpertUnavailable."""
        tasks = [asyncio.ensure_future(each) for each in (self._write(), self._read())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            try:
                await self._stream.write(await self._outgoing.get())
            except asyncio.InvalidStateError:
                return

    async def _read(self) -> None:
        async for data in self._stream:
            self._finish(data)

    def _finish(self, data: bytes) -> None:
        try:
            response, attachment = unpack(expert_pb2.ForwardResponse, data)
        except DecodeError:
            raise ExpertUnavailable("what came on its stream is no ForwardResponse") from None
        pending = self._pending.pop(response.call_id, None)
        if pending is None:  # given up before
            return
        if response.WhichOneof("outcome") == "result":
            seconds = time.monotonic() - pending.started
            result = response.result
            rows = partial(decode_result, result, memory=attachment)
            reply = Reply(rows, result.queue_us, result.compute_us, seconds, pending.bytes_sent, len(data))
            self._mailbox.settle(pending.completion, reply)
            return
        error = from_call_error(response.error)
        self._mailbox.settle(pending.completion, error)
        if response.error.code == ExpertUnavailable.grpc_code:
            self._on_unavailable(error)
