"""The pool and its connections against gRPC servers of this process that behave as each test says; nothing computes."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
import torch

from consilium.config import ExpertGroupConfig
from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable, WireError
from consilium.frames import PROTOCOL_VERSION, Frame
from consilium.rpc import server_options
from consilium.wire import encode_tensor
from gateway import worker_connection, worker_pool
from gateway.mailbox import Completion, Mailbox
from gateway.messages import WorkerStatus
from gateway.placement import describe_missing
from gateway.worker import Reply
from gateway.worker_connection import Expectations
from gateway.worker_pool import View, WorkerPool
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.tensor.v1 import tensor_pb2
from tests.unit.model_configs import tiny_config

pytestmark = pytest.mark.anyio

SECONDS = 60.0  # most that anything may take here
MAX_FRAME = 2**20
MODEL = tiny_config()  # 4 experts in each of 2 layers
ALL = range(MODEL.num_experts)
FRAME = Frame(1, torch.ones(1, MODEL.hidden_size), None, [2], [0, 1], torch.zeros(1, dtype=torch.int32))

Context = grpc.aio.ServicerContext[Any, Any]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


async def test_addresses_behind_one_name_are_replicas_that_come_and_go(names: Names) -> None:
    async with serving(describe(), describe(), describe()) as (first, second, third):
        names.known["experts"] = {first.address, second.address}
        async with following("experts:1") as gateway:
            view = await gateway.until(connected(first, second))
            expected = tuple(sorted((first.address, second.address)))
            assert view.placement.holders == {(layer, expert): expected for layer in range(2) for expert in ALL}
            assert [each.experts for each in view.statuses] == [8, 8]
            kept = view.workers[second.address]
            gateway.send(first)
            await first.receive_call()  # a stream that is cancelled before its worker has seen it is never closed there
            names.known["experts"] = {second.address, third.address}
            view = await gateway.until(connected(second, third))
            gateway.send(third)
            await third.receive_call()
            await asyncio.wait_for(first.closed.get(), SECONDS)
            assert view.workers[second.address] is kept
            view = await gateway.until(lambda view: len(view.statuses) == 2)
            assert {each.address for each in view.statuses} == {second.address, third.address}
            assert second.closed.empty()
        await asyncio.wait_for(third.closed.get(), SECONDS)  # the pool's end closes the others


async def test_a_name_that_does_not_resolve_is_told_and_what_was_known_is_kept(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known["experts"] = OSError("no such name")
        async with following("experts:1") as gateway:
            view = await gateway.until(lambda view: bool(view.statuses))
            assert status(view, "experts:1").detail == "does not resolve: no such name"
            names.known["experts"] = {worker.address}
            view = await gateway.until(connected(worker))
            assert [each.address for each in view.statuses] == [worker.address]
            names.known["experts"] = OSError("the name server is away")
            await names.looked_up("experts")
            gateway.send(worker)
            await worker.receive_call()
            assert worker.closed.empty()


async def test_an_address_that_two_endpoints_name_stays_until_neither_does(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known |= {"one": {worker.address}, "two": {worker.address}}
        async with following("one:1", "two:1") as gateway:
            view = await gateway.until(connected(worker))
            assert [each.address for each in view.statuses] == [worker.address]
            names.known["one"] = set()
            await names.looked_up("one")
            call = gateway.send(worker)
            worker.answer(await worker.receive_call())
            await gateway.outcome(call)
            assert worker.asked.qsize() == 2  # the same two connections from the beginning
            names.known["two"] = set()
            view = await gateway.until(connected())
            await asyncio.wait_for(worker.closed.get(), SECONDS)
            names.known["one"] = {worker.address}
            await gateway.until(connected(worker))


async def test_an_address_that_moves_from_one_name_to_another_is_not_lost(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "RESOLVE_INTERVAL", 0.0)  # one looks while the other still closes
    async with serving(describe()) as (worker,):
        names.known |= {"one": {worker.address}, "two": set()}
        async with following("one:1", "two:1") as gateway:
            await gateway.until(connected(worker))
            for old, new in (("one", "two"), ("two", "one")):
                names.known |= {old: set(), new: {worker.address}}
                await names.looked_up("one")
                await names.looked_up("two")
                await gateway.until_now()
                await gateway.until(connected(worker))


async def test_a_name_that_two_groups_have_may_lose_its_addresses(names: Names) -> None:
    async with serving(describe()) as (worker,):
        names.known["experts"] = {worker.address}
        async with following("experts:1", "experts:1") as gateway:
            await gateway.until(connected(worker))
            names.known["experts"] = set()
            await gateway.until(connected())
            await names.looked_up("experts")
            names.known["experts"] = {worker.address}
            await gateway.until(connected(worker))


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"protocol_version": 7}, f"its protocol version is 7, this gateway's is {PROTOCOL_VERSION}"),
        ({"model_fingerprint": "a" * 64}, f"its model fingerprint is {'a' * 16}, this gateway's is {'f' * 16}"),
        ({"quantization": "int8"}, "its quantization is int8, this gateway's is none"),
        ({"row_dtype": tensor_pb2.DTYPE_BFLOAT16}, "dtype is"),
        ({"hidden_size": 48}, "its hidden size is 48, this gateway's is 32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_worker_of_another_kind_is_refused_and_told_what_differs(fields: dict[str, Any], detail: str) -> None:
    async with (
        serving(describe(**fields), describe()) as (other, worker),
        following(other.address, worker.address) as gateway,
    ):
        view = await gateway.until(lambda view: status(view, other.address).detail.startswith("not used"))
        assert detail in status(view, other.address).detail
        assert not status(view, other.address).connected
        view = await gateway.until(connected(worker))
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        # Once it was restarted as it should be, it is taken.
        other.description.CopyFrom(describe())
        await gateway.until(connected(other, worker))


async def test_of_replicas_with_different_weights_the_odd_one_is_not_used(names: Names) -> None:
    damaged = describe()
    damaged.layers[1].hashes[2] = b"another" * 2 + b"!!"
    async with serving(describe([0]), damaged, describe(numerics_class="other")) as (narrow, odd, worker):
        names.known["experts"] = {narrow.address, odd.address}
        async with following("experts:1") as gateway:
            await gateway.until(connected(narrow, odd))  # nothing that both hold differs
            names.known["experts"].add(worker.address)  # type: ignore[union-attr]  # set just above
            view = await gateway.until(lambda view: status(view, worker.address).detail.startswith("not used"))
            assert status(view, worker.address).detail == (
                "not used: its weights of expert 2 of layer 1 differ from a replica's"
            )
            assert connected(narrow, odd)(view)
            assert view.identities[1, 2].weights == b"another" * 2 + b"!!"
            names.known["experts"] = {narrow.address, worker.address}
            view = await gateway.until(connected(narrow, worker))
            assert status(view, worker.address).detail == ""
            assert view.identities[1, 2] == (bytes([2]) * 16, "other")
            assert (1, 0) not in view.identities  # its two holders compute it differently


async def test_the_experts_nobody_holds_are_named_until_somebody_does() -> None:
    async with serving(describe([0, 3, 99]), describe([1, 2])) as (first, second):
        second.answers.clear()
        async with following(first.address, second.address) as gateway:
            view = await gateway.until(lambda _: True)
            assert describe_missing(view.placement.missing(MODEL)) == "no worker holds experts 0-3 of layers 0-1"
            view = await gateway.until(connected(first))
            assert describe_missing(view.placement.missing(MODEL)) == "no worker holds experts 1-2 of layers 0-1"
            assert status(view, first.address).experts == 4  # those that the model does not have are not counted
            second.answers.set()
            view = await gateway.until(connected(first, second))
            assert view.placement.missing(MODEL) == []


async def test_a_worker_that_hangs_at_describe_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_connection, "DESCRIBE_TIMEOUT", 0.3)
    async with serving(describe(), describe()) as (hung, worker):
        hung.answers.clear()
        async with following(hung.address, worker.address) as gateway:
            await gateway.until(connected(worker))
            view = await gateway.until(lambda view: "Deadline" in status(view, hung.address).detail)
            assert not status(view, hung.address).connected
            assert connected(worker)(view)
            hung.answers.set()
            await gateway.until(connected(hung, worker))


async def test_calls_are_answered_in_any_order_and_fail_alone() -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker) for _ in range(3)]
        ids = [await worker.receive_call() for _ in calls]
        worker.answer(ids[2], 3.0)
        worker.refuse(ids[1], "RESOURCE_EXHAUSTED", "too many")
        worker.answer(ids[2], 4.0)  # twice: the first stands
        worker.answer(12345)  # nobody asked
        worker.answer(ids[0], 1.0)
        for call, value in ((calls[2], 3.0), (calls[0], 1.0)):
            reply = await gateway.outcome(call)
            rows = reply.rows(1, MODEL.hidden_size, torch.float32)
            assert torch.equal(rows, torch.full((1, MODEL.hidden_size), value))
            assert reply.bytes_sent > 4 * MODEL.hidden_size
            assert reply.bytes_received > 4 * MODEL.hidden_size
        assert "too many" in str(await gateway.failure(calls[1]))
        assert connected(worker)(gateway.views[-1])


async def test_a_call_without_an_answer_makes_the_worker_prove_itself() -> None:
    async with serving(describe(), describe()) as (hung, worker), following(hung.address, worker.address) as gateway:
        await gateway.until(connected(hung, worker))
        hung.answers.clear()
        waiting = gateway.send(hung)
        assert isinstance(await gateway.failure(gateway.send(hung, seconds=0.2)), DeadlineExceeded)
        # Nothing more is sent there, and what was underway is to be had from a replica.
        error = await gateway.failure(waiting)
        assert isinstance(error, ExpertUnavailable)
        assert "did not answer in time" in str(error)
        view = await gateway.until(connected(worker))
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        await asyncio.wait_for(hung.closed.get(), SECONDS)
        for _ in range(4):  # on both connections
            await asyncio.wait_for(hung.asked.get(), SECONDS)
        assert connected(worker)(gateway.views[-1])  # it was asked again, and has not answered
        while not hung.received.empty():
            hung.received.get_nowait()
        hung.answers.set()
        await gateway.until(connected(hung, worker))
        call = gateway.send(hung)
        hung.answer(await hung.receive_call())
        await gateway.outcome(call)


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with (
        serving(describe(), describe()) as (leaving, worker),
        following(leaving.address, worker.address) as gateway,
    ):
        view = await gateway.until(connected(leaving, worker))
        held = view.workers[leaving.address]
        taken, late = gateway.send(leaving), gateway.send(leaving)
        first, second = await leaving.receive_call(), await leaving.receive_call()
        leaving.refuse(second, "UNAVAILABLE", "draining: ask another replica")
        error = await gateway.failure(late)
        assert isinstance(error, ExpertUnavailable)
        assert error.retryable
        view = await gateway.until(connected(worker))
        assert "draining" in status(view, leaving.address).detail
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        # An engine that still has the old view is told at once, without the worker.
        assert "draining" in str(await gateway.failure(held.send(FRAME, time.monotonic() + SECONDS)))
        assert leaving.received.empty()
        leaving.answer(first)
        assert (await gateway.outcome(taken)).bytes_received
        assert leaving.closed.empty()


async def test_a_broken_stream_settles_its_calls_and_is_opened_again() -> None:
    async with (
        serving(describe(), describe()) as (broken, worker),
        following(broken.address, worker.address) as gateway,
    ):
        await gateway.until(connected(broken, worker))
        calls = [gateway.send(broken) for _ in range(3)]
        for _ in calls:
            await broken.receive_call()
        elsewhere = gateway.send(worker)
        broken.streams[-1].to_send.put_nowait(None)
        for call in calls:
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "broken by the test" in str(error)
        worker.answer(await worker.receive_call())
        await gateway.outcome(elsewhere)
        await gateway.until(connected(worker))
        await gateway.until(connected(broken, worker))
        call = gateway.send(broken)
        broken.answer(await broken.receive_call())
        await gateway.outcome(call)


PROMPT = replace(FRAME, prefill=True)


async def test_single_tokens_and_prompts_have_a_connection_each() -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker, frame=frame) for frame in (FRAME, PROMPT, FRAME, PROMPT)]
        ids = [await worker.receive_call() for _ in calls]
        assert len({stream.peer for stream in worker.streams}) == len(worker.streams) == 2
        for call_id in ids:
            worker.answer(call_id)
        for call in calls:
            await gateway.outcome(call)


@pytest.mark.parametrize("broken", [FRAME, PROMPT], ids=["decode", "prefill"])
async def test_when_one_connection_breaks_the_calls_of_both_are_had_elsewhere(broken: Frame) -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker, frame=broken)]
        await worker.receive_call()
        calls.append(gateway.send(worker, frame=PROMPT if broken is FRAME else FRAME))
        await worker.receive_call()
        worker.streams[0].to_send.put_nowait(None)
        for call in calls:
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "broken by the test" in str(error)
        await gateway.until(connected())
        await gateway.until(connected(worker))


async def test_behind_a_balancer_prompts_share_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Every connection leads to another worker: the second one is not used."""
    async with serving(describe()) as (worker,):
        worker.restless = True
        with caplog.at_level("INFO", "gateway.worker_connection"):
            async with following(worker.address) as gateway:
                await gateway.until(connected(worker))
                calls = [gateway.send(worker, frame=frame) for frame in (FRAME, PROMPT)]
                ids = [await worker.receive_call() for _ in calls]
                assert len({stream.peer for stream in worker.streams}) == 1
                for call_id in ids:
                    worker.answer(call_id)
                for call in calls:
                    await gateway.outcome(call)
    assert "prompts share its connection" in caplog.text


async def test_bytes_that_are_no_answer_end_the_session_and_nothing_else() -> None:
    async with serving(describe(), describe()) as (liar, worker), following(liar.address, worker.address) as gateway:
        await gateway.until(connected(liar, worker))
        whole = expert_pb2.ForwardResponse(call_id=1, result=expert_pb2.Result(rows=encode_tensor(torch.ones(9))))
        for said in (b"\xff\xff\xff", whole.SerializeToString()[:-5]):
            call = gateway.send(liar)
            liar.say(said, await liar.receive_call())
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "no ForwardResponse" in str(error)
            elsewhere = gateway.send(worker)
            worker.answer(await worker.receive_call())
            await gateway.outcome(elsewhere)
            await gateway.until(connected(worker))
            await gateway.until(connected(liar, worker))


@pytest.mark.parametrize(
    "lie",
    [
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "data": bytes(4 * MODEL.hidden_size - 1)},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [2**32 - 1, MODEL.hidden_size], "data": b""},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "offset": 0},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "offset": 2**64 - 4},
        {"dtype": tensor_pb2.DTYPE_INT8, "shape": [1, MODEL.hidden_size], "data": bytes(MODEL.hidden_size)},
    ],
    ids=["truncated", "a huge shape", "nothing attached", "past the end", "another dtype"],
)
@pytest.mark.parametrize("attached", [b"", b"short"])
async def test_rows_that_lie_are_refused_and_the_stream_goes_on(lie: dict[str, Any], attached: bytes) -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        call = gateway.send(worker)
        call_id = await worker.receive_call()
        result = expert_pb2.Result(rows=tensor_pb2.Tensor(**lie))
        worker.say(expert_pb2.ForwardResponse(call_id=call_id, result=result, attachment=attached))
        reply = await gateway.outcome(call)
        with pytest.raises(WireError, match="result rows: "):
            reply.rows(1, MODEL.hidden_size, torch.float32)
        call = gateway.send(worker)
        worker.answer(await worker.receive_call())
        await gateway.outcome(call)


async def test_a_port_where_nobody_listens_is_told() -> None:
    async with serving(describe()) as (gone,):
        nobody = gone.address
    async with following(nobody) as gateway:
        view = await gateway.until(lambda view: "connect" in status(view, nobody).detail.replace("connecting", ""))
        assert not status(view, nobody).connected
        assert not view.workers
