"""Workers that behave as each test says, gRPC servers of this process, and a gateway's pool that follows them."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import torch

from consilium.config import ExpertGroupConfig
from consilium.errors import ConsiliumError
from consilium.frames import PROTOCOL_VERSION, Frame
from consilium.rpc import server_options
from consilium.wire import encode_tensor
from gateway import worker_pool
from gateway.mailbox import Completion, Mailbox
from gateway.messages import WorkerStatus
from gateway.worker import Reply
from gateway.worker_connection import Expectations
from gateway.worker_pool import View, WorkerPool
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.tensor.v1 import tensor_pb2
from tests.unit.model_configs import tiny_config

SECONDS = 60.0  # most that anything may take here
MAX_FRAME = 2**20
MODEL = tiny_config()  # 4 experts in each of 2 layers
ALL = range(MODEL.num_experts)
FRAME = Frame(1, torch.ones(1, MODEL.hidden_size), None, [2], [0, 1], torch.zeros(1, dtype=torch.int32))

Context = grpc.aio.ServicerContext[Any, Any]


def describe(experts: Iterable[int] = ALL, **fields: Any) -> expert_pb2.DescribeResponse:
    """A worker that fits, with these experts in both layers; ``fields`` say what is different."""
    held = list(experts)
    hashes = [bytes([each]) * 16 for each in held]
    layers = [expert_pb2.LayerExperts(layer=layer, experts=held, hashes=hashes) for layer in range(MODEL.num_layers)]
    fits: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": "f" * 64,
        "quantization": "none",
        "row_dtype": tensor_pb2.DTYPE_FLOAT32,
        "hidden_size": MODEL.hidden_size,
        "numerics_class": "reference",
    }
    return expert_pb2.DescribeResponse(layers=layers, **{**fits, **fields})


@dataclass(eq=False)
class Stream:
    """One that a gateway has opened: from where, and what it is to be sent; None breaks it."""

    peer: str
    to_send: asyncio.Queue[expert_pb2.ForwardResponse | bytes | None] = field(default_factory=asyncio.Queue)


def as_bytes(response: expert_pb2.ForwardResponse | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


class Bare(grpc.aio.ServerInterceptor):
    """Lets Forward answer with bytes that are no message."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.stream_stream is None:
            return handler
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, handler.request_deserializer, as_bytes)


class FakeWorker(expert_pb2_grpc.ExpertServiceServicer):
    """Hands what it receives to the test and sends what the test says; Describe waits while ``answers`` is not set."""

    def __init__(self, description: expert_pb2.DescribeResponse) -> None:
        self.description = description
        self.address, self.restless = "", False  # another worker to every connection
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked: asyncio.Queue[None] = asyncio.Queue()  # one for each Describe
        self.received: asyncio.Queue[expert_pb2.ForwardRequest] = asyncio.Queue()
        self.streams: list[Stream] = []  # in the order of their first calls
        self._of_call: dict[int, Stream] = {}
        self.closed: asyncio.Queue[None] = asyncio.Queue()  # one for each stream that ended

    async def Describe(self, request: expert_pb2.DescribeRequest, context: Context) -> expert_pb2.DescribeResponse:
        self.asked.put_nowait(None)
        await self.answers.wait()
        if self.restless:
            return describe(worker_id=context.peer())
        return self.description

    # The generated stub knows generators only; gRPC also takes coroutines that write to the context.
    async def Forward(  # type: ignore[override]
        self, requests: AsyncIterator[expert_pb2.ForwardRequest], context: Context
    ) -> None:
        stream = Stream(context.peer())
        reading = asyncio.ensure_future(self._read(requests, stream))
        try:
            while (response := await stream.to_send.get()) is not None:
                await context.write(response)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")
        finally:
            reading.cancel()
            self.closed.put_nowait(None)

    async def ForwardOnce(
        self, request: expert_pb2.ForwardOnceRequest, context: Context
    ) -> expert_pb2.ForwardOnceResponse:
        raise NotImplementedError("the gateway always streams")

    async def FetchWeights(
        self, request: expert_pb2.FetchWeightsRequest, context: Context
    ) -> AsyncIterator[expert_pb2.FetchWeightsResponse]:
        raise NotImplementedError("gateways have no use for weights")
        yield expert_pb2.FetchWeightsResponse()

    async def _read(self, requests: AsyncIterator[expert_pb2.ForwardRequest], stream: Stream) -> None:
        async for request in requests:
            if stream not in self.streams:
                self.streams.append(stream)
            self._of_call[request.call.call_id] = stream
            self.received.put_nowait(request)

    async def receive(self) -> expert_pb2.ForwardRequest:
        return await asyncio.wait_for(self.received.get(), SECONDS)

    async def receive_call(self) -> int:
        """The id of the next call that arrives."""
        return (await self.receive()).call.call_id

    def answer(self, call_id: int, value: float = 1.0) -> None:
        rows = encode_tensor(torch.full((1, MODEL.hidden_size), value))
        self.say(expert_pb2.ForwardResponse(call_id=call_id, result=expert_pb2.Result(rows=rows)))

    def say(self, response: expert_pb2.ForwardResponse | bytes, call_id: int = 0) -> None:
        """On the stream of the call, or on the newest one; bytes are not what gRPC expects here."""
        if isinstance(response, expert_pb2.ForwardResponse):
            call_id = call_id or response.call_id
        self._of_call.get(call_id, self.streams[-1]).to_send.put_nowait(response)

    def refuse(self, call_id: int, code: str, message: str) -> None:
        error = expert_pb2.CallError(code=code, message=message, retryable=True)
        self.say(expert_pb2.ForwardResponse(call_id=call_id, error=error))


@asynccontextmanager
async def serving(*descriptions: expert_pb2.DescribeResponse) -> AsyncIterator[list[FakeWorker]]:
    """A server for each description."""
    workers: list[FakeWorker] = []
    servers: list[grpc.aio.Server] = []
    try:
        for description in descriptions:
            worker, server = FakeWorker(description), grpc.aio.server(interceptors=[Bare()], options=server_options())
            expert_pb2_grpc.add_ExpertServiceServicer_to_server(worker, server)
            worker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            workers.append(worker)
            servers.append(server)
        yield workers
    finally:
        for server in servers:
            await server.stop(None)


class Gateway:
    """The engine's side: the newest view and the outcomes of calls; it waits in another thread, as the engine does."""

    def __init__(self) -> None:
        self.mailbox = Mailbox(self._handle)
        self.views: list[View] = []

    def _handle(self, event: object) -> None:
        assert isinstance(event, View)
        self.views.append(event)

    async def until(self, condition: Callable[[View], bool]) -> View:
        """The first view from now on, the newest included, of which ``condition`` is true."""
        return await asyncio.to_thread(self._until, condition)

    def _until(self, condition: Callable[[View], bool]) -> View:
        deadline = time.monotonic() + SECONDS
        while not self.views or not condition(self.views[-1]):
            if not self.mailbox.receive(max(0.01, deadline - time.monotonic())):
                pytest.fail(f"not seen; the last view is {self.views[-1:]}")
        return self.views[-1]

    async def until_now(self) -> None:
        """Take everything that has been posted."""
        while self.mailbox.receive(0):
            pass

    async def outcome(self, call: Completion[Reply]) -> Reply:
        async def wait() -> Reply:
            return await call

        return await asyncio.to_thread(lambda: self.mailbox.drive(wait()))

    async def failure(self, call: Completion[Reply]) -> ConsiliumError:
        with pytest.raises(ConsiliumError) as caught:
            await self.outcome(call)
        return caught.value

    def send(self, worker: FakeWorker, seconds: float = SECONDS, frame: Frame = FRAME) -> Completion[Reply]:
        return self.views[-1].workers[worker.address].send(frame, time.monotonic() + seconds)


@asynccontextmanager
async def following(*endpoints: str) -> AsyncIterator[Gateway]:
    """A pool over groups g0, g1, … of one endpoint each; afterwards it has ended without an error of its own."""
    gateway = Gateway()
    groups = {f"g{number}": ExpertGroupConfig(endpoint=f"grpc://{each}") for number, each in enumerate(endpoints)}
    expected = Expectations("f" * 64, "none", tensor_pb2.DTYPE_FLOAT32, MODEL.hidden_size)
    running = asyncio.ensure_future(WorkerPool(groups, MAX_FRAME, MODEL, expected, gateway.mailbox).run())
    try:
        yield gateway
    finally:
        running.cancel()
        (ended,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError), ended


def status(view: View, address: str) -> WorkerStatus:
    """What ``view`` says of one address; a status that is not there is one without detail."""
    found = [each for each in view.statuses if each.address.removeprefix("grpc://") == address]
    return found[0] if found else WorkerStatus("", address, False)


def connected(*workers: FakeWorker) -> Callable[[View], bool]:
    """Whether exactly these may be sent frames."""
    addresses = {worker.address for worker in workers}
    return lambda view: set(view.workers) == addresses


class Names:
    """A name service: what each name resolves to, and when it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, set[str] | OSError] = {}
        self.asked: dict[str, asyncio.Queue[None]] = {}
        monkeypatch.setattr(worker_pool, "RESOLVE_INTERVAL", 0.01)
        monkeypatch.setattr(WorkerPool, "_resolve", staticmethod(self._resolve))

    async def _resolve(self, host: str, port: int) -> set[str]:
        self.asked.setdefault(host, asyncio.Queue()).put_nowait(None)
        found = self.known[host]
        if isinstance(found, OSError):
            raise found
        return set(found)

    async def looked_up(self, host: str) -> None:
        """Wait until what is now known of ``host`` has been seen and acted on."""
        while not self.asked[host].empty():
            self.asked[host].get_nowait()
        for _ in range(2):  # the second look follows what the first led to
            await asyncio.wait_for(self.asked[host].get(), SECONDS)
