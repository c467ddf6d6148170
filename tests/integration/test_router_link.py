"""A gateway's pool under a router of the test's: it connects to whom it is told, and asks for what it is told."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from consilium.config import RouterConfig
from gateway.worker_connection import Expectations
from gateway.worker_pool import WorkerPool
from protos.router.v1 import router_pb2, router_pb2_grpc
from protos.tensor.v1 import tensor_pb2
from tests.integration.fake_workers import (
    ALL,
    MAX_FRAME,
    MODEL,
    SECONDS,
    FakeWorker,
    Gateway,
    connected,
    describe,
    serving,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Tells what the test says; None breaks the stream."""

    def __init__(self) -> None:
        self.placements: asyncio.Queue[router_pb2.Placement | None] = asyncio.Queue()
        self.known: asyncio.Queue[int] = asyncio.Queue()  # the epoch that each caller says it has
        self.reports: asyncio.Queue[router_pb2.ReportLoadRequest] = asyncio.Queue()
        self.acknowledged: asyncio.Queue[router_pb2.AcknowledgeRequest] = asyncio.Queue()

    async def WatchPlacement(
        self, request: router_pb2.WatchPlacementRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[router_pb2.WatchPlacementResponse]:
        self.known.put_nowait(request.known_epoch)
        while (placement := await self.placements.get()) is not None:
            yield router_pb2.WatchPlacementResponse(placement=placement)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken by the test")

    async def Acknowledge(
        self, request: router_pb2.AcknowledgeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.AcknowledgeResponse:
        self.acknowledged.put_nowait(request)
        return router_pb2.AcknowledgeResponse()

    async def until_used(self, epoch: int) -> None:
        """Return when the gateway says that it uses this one."""
        while (await asyncio.wait_for(self.acknowledged.get(), SECONDS)).epoch != epoch:
            pass

    async def ReportLoad(
        self, request: router_pb2.ReportLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> router_pb2.ReportLoadResponse:
        self.reports.put_nowait(request)
        return router_pb2.ReportLoadResponse()

    def place(self, epoch: int, held: dict[FakeWorker, list[int]]) -> None:
        """The same experts in both layers."""
        hashes = b"".join(bytes([each + 1]) * 16 for each in ALL)
        workers = [
            router_pb2.PlacedWorker(
                address=worker.address,
                group="experts",
                experts=[router_pb2.ExpertSet(layer=layer, experts=experts) for layer in range(MODEL.num_layers)],
            )
            for worker, experts in held.items()
        ]
        layers = [router_pb2.LayerHashes(layer=layer, hashes=hashes) for layer in range(MODEL.num_layers)]
        self.placements.put_nowait(router_pb2.Placement(epoch=epoch, workers=workers, hashes=layers))


@asynccontextmanager
async def routed() -> AsyncIterator[tuple[FakeRouter, Gateway, WorkerPool]]:
    router = FakeRouter()  # type: ignore[abstract]  # the pool calls nothing else
    server, gateway = grpc.aio.server(), Gateway()
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    config = RouterConfig(endpoint=f"grpc://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    expected = Expectations("f" * 64, "none", tensor_pb2.DTYPE_FLOAT32, MODEL.hidden_size)
    pool = WorkerPool({}, MAX_FRAME, MODEL, expected, gateway.mailbox, config)
    running = asyncio.ensure_future(pool.run())
    try:
        yield router, gateway, pool
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.stop(None)


async def test_a_gateway_asks_whom_the_router_names_for_what_it_names() -> None:
    async with serving(describe(), describe(), describe()) as (first, second, third), routed() as (router, gateway, _):
        router.place(1, {first: [0, 1], second: [2, 3]})
        view = await gateway.until(connected(first, second))
        # Both say in Describe that they hold everything; the router says what they are for.
        assert view.placement.holders[0, 1] == (first.address,)
        assert view.placement.holders[1, 2] == (second.address,)
        assert view.identities[1, 2].weights == bytes([3]) * 16
        kept = view.workers[second.address]
        router.place(2, {second: [0, 1, 2, 3], third: [0]})
        view = await gateway.until(connected(second, third))
        assert view.workers[second.address] is kept
        assert set(view.placement.holders[1, 0]) == {second.address, third.address}
        router.placements.put_nowait(None)  # it is gone, and comes back with nothing new
        assert [await asyncio.wait_for(router.known.get(), SECONDS) for _ in range(2)] == [0, 2]
        gateway.send(second)
        await second.receive_call()
        router.place(3, {second: [0, 1, 2, 3]})
        await gateway.until(connected(second))


async def test_a_placement_is_used_once_all_its_workers_are_reached_and_what_was_before_until_then() -> None:
    async with serving(describe(), describe()) as (first, second), routed() as (router, gateway, _):
        router.place(1, {first: [0, 1, 2, 3]})
        await router.until_used(1)
        second.answers.clear()  # it does not answer Describe yet
        router.place(2, {second: [0, 1, 2, 3]})
        await asyncio.wait_for(second.asked.get(), SECONDS)
        view = await gateway.until(connected(first))
        assert view.placement.holders[0, 1] == (first.address,)
        second.answers.set()
        await router.until_used(2)
        view = await gateway.until(connected(second))
        assert view.placement.holders[0, 1] == (second.address,)
    while not router.acknowledged.get_nowait().leaving:
        pass


async def test_what_was_asked_for_is_reported() -> None:
    async with routed() as (router, _, pool):
        assert pool.router is not None
        pool.router.report({1: ([5, 0, 0, 7], [2, 0, 0, 1])})
        report = await asyncio.wait_for(router.reports.get(), SECONDS)
        assert [(each.layer, list(each.rows), list(each.reads)) for each in report.layers] == [
            (1, [5, 0, 0, 7], [2, 0, 0, 1])
        ]
