"""The gRPC face of a worker: Describe, Forward, ForwardOnce, and leaving without dropping a call."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from consilium.attachment import Attachment, unpack
from consilium.errors import ExpertUnavailable, StalePlacement, UnreadableWeights
from consilium.experts import ExpertWeights
from consilium.frames import encode_result
from expert_service.call_queue import Job, Outcome
from expert_service.calls import Call, MessageCall
from expert_service.executor import Executor
from expert_service.metrics import ServiceMetrics
from expert_service.sources import chunks
from expert_service.store import ExpertStore
from expert_service.stream import Answer, ForwardStream, Request
from protos.expert.v1 import expert_pb2, expert_pb2_grpc

SERVICE = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name
DRAINING = "draining: this worker is shutting down and takes no more calls; another replica may have the expert"
Context = grpc.aio.ServicerContext[Any, Any]


class ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    """Answers from one executor; everything but the computing happens on the event loop."""

    def __init__(
        self,
        description: expert_pb2.DescribeResponse,
        executor: Executor,
        metrics: ServiceMetrics,
        max_unread: int,
        store: ExpertStore,
    ) -> None:
        self._store = store
        self._description, self._executor, self._max_unread = description, executor, max_unread
        self._metrics = metrics
        self._draining = False
        self._streams: set[ForwardStream] = set()
        self._running = 0  # Forward and ForwardOnce together
        self._quiet = asyncio.Event()

    async def Describe(self, request: expert_pb2.DescribeRequest, context: Context) -> expert_pb2.DescribeResponse:
        return self._description

    # The generated stub knows generators only; gRPC also takes coroutines that write to the context, and those are
    # certain to be told at once when the caller is gone.
    async def Forward(  # type: ignore[override]
        self, requests: AsyncIterator[Request], context: Context
    ) -> None:
        """As :class:`BareForward` has it: requests are unpacked, answers are bytes already."""
        if not self._draining:
            stream = ForwardStream(self.submit, self._max_unread)
            with self._counted():
                self._streams.add(stream)
                try:
                    await stream.run(requests, context.write)
                except DecodeError:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the bytes sent are no ForwardRequest")
                finally:
                    self._streams.discard(stream)
        if self._draining:  # what the caller sent since is unanswered, and may be sent elsewhere
            await context.abort(grpc.StatusCode.UNAVAILABLE, DRAINING)

    async def ForwardOnce(
        self,
        request: expert_pb2.ForwardOnceRequest,
        context: Context,
    ) -> expert_pb2.ForwardOnceResponse:
        with self._counted():
            done = await self.submit(request.call)
            return expert_pb2.ForwardOnceResponse(result=encode_result(done.rows, done.queue_us, done.compute_us))

    # The generated stub knows generators only.
    async def FetchWeights(
        self, request: expert_pb2.FetchWeightsRequest, context: Context
    ) -> AsyncIterator[expert_pb2.FetchWeightsResponse]:
        try:
            (weights,) = self._store.find(request.layer, [request.expert])
            found = weights if isinstance(weights, ExpertWeights) else await asyncio.to_thread(weights.copy)
        except (StalePlacement, UnreadableWeights) as error:
            await context.abort(grpc.StatusCode[error.grpc_code], error.message)
        parts = chunks(found)
        while data := await asyncio.to_thread(next, parts, b""):  # they may have to be read from a disk
            yield expert_pb2.FetchWeightsResponse(data=data)

    async def drain(self) -> None:
        """Take nothing new, and return when every call taken has been answered."""
        self._draining = True
        for stream in self._streams:
            stream.end()
        if self._running:
            await self._quiet.wait()
        # Those of local links, which the event loop knows nothing of.
        loop, idle = asyncio.get_running_loop(), asyncio.Event()
        self._executor.queue.when_empty(lambda: loop.call_soon_threadsafe(idle.set))
        await idle.wait()

    def submit(self, message: expert_pb2.Call, attachment: Attachment | None = None) -> Answer:
        """Queue a call of the event loop. Raises as :meth:`take` does; cancel the future to give it up."""
        loop = asyncio.get_running_loop()
        answer = Answer(loop=loop)
        settle = partial(_settle, answer)
        call = MessageCall(message, attachment)
        answer.job = self.take(call, lambda outcome: loop.call_soon_threadsafe(settle, outcome))
        answer.add_done_callback(lambda done: answer.withdraw() if done.cancelled() else None)
        return answer

    def admit(self) -> None:
        """Raises ExpertUnavailable while draining."""
        if self._draining:
            raise ExpertUnavailable(DRAINING)

    def take(self, call: Call, answer: Callable[[Outcome], object]) -> Job:
        """Queue a call; any thread may. Raises as the executor does, and ExpertUnavailable while draining."""
        try:
            self.admit()
            return self._executor.submit(call, answer)
        except Exception as error:
            self._metrics.refused(error)
            raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._quiet.set()


class BareForward(grpc.aio.ServerInterceptor):
    """Takes the generated (de)serializers from Forward: they would copy every tensor several times."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.stream_stream is None or handler_call_details.method != f"/{SERVICE}/Forward":
            return handler
        deserializer = partial(unpack, expert_pb2.ForwardRequest)
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, request_deserializer=deserializer)


def _settle(answer: Answer, outcome: Outcome) -> None:
    if answer.done():  # given up
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
