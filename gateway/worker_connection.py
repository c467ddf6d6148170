"""The way to one worker: Describe, then long-lived Forward streams, again and again until closed.

Single tokens and prompts have a stream each, over a connection of their own: on a shared one a token waits for all the
bytes of the prompts before it. With a worker on this host frames go over a local link instead, and the streams are for
those that find no room there.
Everything here runs on the I/O thread, except :meth:`WorkerConnection.send`, which the engine's thread calls.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import grpc
import torch

from consilium.attachment import Parts
from consilium.config import ExpertGroupConfig, has_integer_rows
from consilium.errors import ConfigError, ConsiliumError, ExpertUnavailable
from consilium.frames import PROTOCOL_VERSION, Frame, encode_call
from consilium.link_packets import RowFormat
from consilium.rpc import channel_options, from_rpc_error
from consilium.tokens import Metadata
from consilium.wire import TORCH_DTYPES
from gateway.forward_stream import ForwardStream
from gateway.local_link import LocalLink, Times, open_link
from gateway.mailbox import Completion, Mailbox
from gateway.worker import Reply
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.tensor.v1 import tensor_pb2

log = logging.getLogger(__name__)

REFUSED = "not used: "  # begins the detail of a worker that answers but does not fit
DESCRIBE_TIMEOUT = 5.0  # seconds
LINK_FRAMES = 2  # largest frames that a link's memory has room for, with their results; pages are committed as needed
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0  # seconds between attempts to connect


@dataclass(frozen=True, slots=True)
class Expectations:
    """What every worker of this deployment must be like."""

    model_fingerprint: str
    quantization: str
    row_dtype: tensor_pb2.Dtype.ValueType
    hidden_size: int
    local_links: bool = True  # pass frames without gRPC where that is possible
    metadata: Metadata = ()  # what this gateway shows with its RPCs
    weight_version: str = ""

    def check(self, description: expert_pb2.DescribeResponse) -> None:
        """Raises ConfigError that says what differs and which of the two sides says what."""
        for what, ours, theirs in (
            ("protocol version", PROTOCOL_VERSION, description.protocol_version),
            ("model fingerprint", self.model_fingerprint[:16], description.model_fingerprint[:16]),
            ("version of the weights", repr(self.weight_version), repr(description.weight_version)),
            ("quantization", self.quantization, description.quantization),
            ("dtype", _dtype_name(self.row_dtype), _dtype_name(description.row_dtype)),
            ("hidden size", self.hidden_size, description.hidden_size),
        ):
            if ours != theirs:
                raise ConfigError(f"{REFUSED}its {what} is {theirs}, this gateway's is {ours}; start both alike")


def _dtype_name(code: tensor_pb2.Dtype.ValueType) -> str:
    return str(TORCH_DTYPES.get(code, code)).removeprefix("torch.")


class WorkerConnection:
    """One worker as the gateway reaches it."""

    def __init__(
        self,
        group: str,
        address: str,
        config: ExpertGroupConfig,
        max_frame: int,
        expectations: Expectations,
        mailbox: Mailbox,
        on_change: Callable[[], None],
    ) -> None:
        self.group, self.address = group, address
        self.description: expert_pb2.DescribeResponse | None = None  # set while it may be sent frames
        self.detail = "connecting"
        self._config, self._max_frame, self._expectations = config, max_frame, expectations
        self._mailbox, self._on_change = mailbox, on_change
        self._loop = asyncio.get_running_loop()
        self._call_ids = itertools.count(1)
        self._decode: ForwardStream | None = None
        self._prefill: ForwardStream | None = None
        self._suspect = asyncio.Event()
        self._link: LocalLink | None = None
        self.on_end: Callable[[], None] = lambda: None  # told on the I/O thread when the session ends
        self._lost = self._no_link = ""  # why the last link was, and why there is none

    @property
    def identity(self) -> str:
        """Of the process that is connected; empty while it is not described."""
        return "" if self.description is None else self.description.worker_id

    @property
    def numerics_class(self) -> str:
        """As the worker states it; empty while it is not described."""
        return "" if self.description is None else self.description.numerics_class

    @property
    def local_link(self) -> bool:
        """Whether frames go there without gRPC."""
        link = self._link
        return link is not None and link.open

    @property
    def transport(self) -> Literal["", "grpc", "local"]:
        """What frames go over now; empty while there are none."""
        if self.description is None:
            return ""
        return "local" if self.local_link else "grpc"

    # -- the engine's side ---------------------------------------------------------------------------------------

    def time_limit(self, pairs: int) -> float:
        """One `timeout` for each compute batch of `max_batch` rows."""
        return self._config.timeout * -(-pairs // self._config.max_batch)

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        """Start one call; its outcome comes through the mailbox."""
        call_id = next(self._call_ids)
        milliseconds = max(1, int((deadline - time.monotonic()) * 1e3))
        completion: Completion[Reply] = Completion(
            deadline, lambda: self._expire(call_id), lambda: self._withdraw(call_id)
        )
        link = self._link
        if link is None or not link.open or not link.send(call_id, frame, milliseconds, completion):
            parts = Parts()
            call = encode_call(frame, call_id, milliseconds, parts.place)
            request = parts.pack(expert_pb2.ForwardRequest(call=call))
            self._call_loop(lambda: self._start(call_id, frame.prefill, request, completion))
        return completion

    @property
    def device_uuid(self) -> str:
        """The GPU on which it can compute whole steps for us; empty where it cannot."""
        description = self.description
        return description.device_uuid if description is not None and self.local_link else ""

    def ask(self, packet: Callable[[int], bytes], deadline: float) -> Completion[Times]:
        """Send the packet that is made for a call id over the local link; it is answered when it is done."""
        call_id = next(self._call_ids)
        completion: Completion[Times] = Completion(deadline, lambda: self._expire(call_id))
        link = self._link
        if link is None or not link.open:
            completion.settle(ExpertUnavailable(self.detail or "it has no local link"))
        else:
            link.ask(call_id, packet(call_id), completion)
        return completion

    def _expire(self, call_id: int) -> None:
        link = self._link  # once: the I/O thread may take it away at any time
        if link is None or not link.give_up(call_id):
            self._call_loop(lambda: self._give_up(call_id))

    def _withdraw(self, call_id: int) -> None:
        link = self._link
        if link is None or not link.cancel(call_id):
            self._call_loop(lambda: self._cancel(call_id))

    def _call_loop(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    # -- the I/O thread's side -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a session open until cancelled."""
        backoff, reported = FIRST_BACKOFF, ""
        while True:
            started = time.monotonic()
            try:
                await self._session()
                self.detail = "the worker closed the stream"
            except ConsiliumError as error:
                self.detail = error.message
            except grpc.aio.AioRpcError as error:
                self.detail = from_rpc_error(error).message
            finally:
                self._end_session()
            if self.detail != reported:  # not the same again at every attempt
                log.warning("worker %s of group %s: %s", self.address, self.group, self.detail)
                reported = self.detail
            lasted = time.monotonic() - started > LAST_BACKOFF
            backoff = FIRST_BACKOFF if lasted else min(backoff * 2, LAST_BACKOFF)
            await asyncio.sleep(backoff)

    async def _session(self) -> None:
        async with self._channel() as first, self._channel() as second:
            description, other = await asyncio.gather(self._describe(first), self._describe(second))
            if other.worker_id != description.worker_id:  # a balancer stands between
                log.info("worker %s: prompts share its connection: a second one leads elsewhere", self.address)
                second = first
            self._suspect.clear()
            self._link = await self._open_link(description)
            shown = self._expectations.metadata
            self._decode = ForwardStream(first, self._mailbox, self._drained, shown)
            self._prefill = ForwardStream(second, self._mailbox, self._drained, shown)
            self.description, self.detail = description, self._no_link
            self._on_change()
            tasks = [
                asyncio.ensure_future(each) for each in (self._decode.run(), self._prefill.run(), self._suspect.wait())
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if self._suspect.is_set():
            raise ExpertUnavailable(self._lost or "did not answer in time")

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=channel_options(self._max_frame))

    async def _describe(self, channel: grpc.aio.Channel) -> expert_pb2.DescribeResponse:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        shown = self._expectations.metadata
        description = await stub.Describe(expert_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT, metadata=shown)
        self._expectations.check(description)
        return description

    async def _open_link(self, description: expert_pb2.DescribeResponse) -> LocalLink | None:
        """Where both sides want one and are on one host; else says why there is none."""
        self._lost = self._no_link = ""
        if not self._expectations.local_links or not description.local_sockets:
            return None
        replies = TORCH_DTYPES[description.row_dtype]
        form = RowFormat(
            description.hidden_size, torch.int8 if has_integer_rows(description.quantization) else replies, replies
        )
        size = LINK_FRAMES * self._max_frame
        try:
            link = await open_link(description.local_sockets, description.worker_id, size, form, self._mailbox)
        except ExpertUnavailable as error:
            self._no_link = f"over gRPC alone: {error.message}"
            log.info("worker %s: %s", self.address, self._no_link)
            return None
        link.on_lost = lambda error: self._call_loop(lambda: self._lose_link(error))
        link.on_unavailable = lambda error: self._call_loop(lambda: self._drained(error))
        link.start()
        log.info("worker %s: over a local link", self.address)
        return link

    def _lose_link(self, error: ConsiliumError) -> None:
        """The worker behind it is gone or hangs: no more frames until it has answered Describe again."""
        self._lost = error.message
        self._suspect.set()

    def _drained(self, error: ConsiliumError) -> None:
        """It leaves: what it has taken will be answered, nothing new is sent."""
        if self.description is not None:
            self.description, self.detail = None, error.message
            self._on_change()

    def _start(self, call_id: int, prefill: bool, request: bytes, completion: Completion[Reply]) -> None:
        stream = self._prefill if prefill else self._decode
        if self.description is None or stream is None:
            self._mailbox.settle(completion, ExpertUnavailable(self.detail))
        else:
            stream.start(call_id, request, completion)

    def _cancel(self, call_id: int) -> None:
        for stream in (self._decode, self._prefill):
            if stream is not None:
                stream.cancel(call_id)

    def _give_up(self, call_id: int) -> None:
        """A call ran out of time. The worker may hang: no more frames until it has answered Describe again."""
        if any(stream.give_up(call_id) for stream in (self._decode, self._prefill) if stream is not None):
            self._suspect.set()

    def _end_session(self) -> None:
        self.on_end()
        self.description = None
        link, self._link = self._link, None
        if link is not None:
            error = ExpertUnavailable(self.detail)
            link.on_lost = link.on_unavailable = lambda _: None
            self._mailbox.post(lambda: link.lose(error))
        for stream in (self._decode, self._prefill):
            if stream is not None:
                stream.fail(ExpertUnavailable(self.detail))
        self._decode = self._prefill = None
        self._on_change()
