"""The gateway's link to the router: placements one way, what was asked of the experts the other. On the I/O thread.

While no router can be reached the last placement stays: a router is never needed to answer a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable

import grpc

from consilium.config import RouterConfig
from consilium.content_hash import HASH_BYTES
from consilium.rpc import from_rpc_error, router_channel_options
from gateway.epochs import PlacedWorker, RouterView
from gateway.expert_meter import ExpertCounts
from gateway.worker_connection import Expectations
from protos.router.v1 import router_pb2, router_pb2_grpc

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
REPORT_SECONDS = 5.0  # most that a report may take; nobody waits
ACKNOWLEDGE_SECONDS = 5.0  # between two times that the router hears which epoch is used
GOODBYE_SECONDS = 1.0


class RouterLink:
    """Follows one router until cancelled."""

    def __init__(self, config: RouterConfig, on_view: Callable[[RouterView], None], ours: Expectations) -> None:
        """``on_view`` is told of every epoch; ``ours`` says who this gateway is, and which weights it serves."""
        assert config.endpoint is not None
        self._target, self._on_view = config.endpoint.removeprefix("grpc://"), on_view
        self._metadata, self._version = ours.metadata, ours.weight_version
        self._gateway_id = uuid.uuid4().hex
        self._counts: asyncio.Queue[ExpertCounts] = asyncio.Queue()
        self._used, self._moved = 0, asyncio.Event()

    def report(self, counts: ExpertCounts) -> None:
        """Tell the router when it can be reached."""
        self._counts.put_nowait(counts)

    def acknowledge(self, epoch: int) -> None:
        """This gateway uses ``epoch``, and nothing older."""
        self._used = epoch
        self._moved.set()

    async def run(self) -> None:
        """Watch and report until cancelled."""
        async with grpc.aio.insecure_channel(self._target, options=router_channel_options()) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            try:
                await asyncio.gather(self._watch(stub), self._report(stub), self._acknowledge(stub))
            finally:
                await self._tell(stub, leaving=True, seconds=GOODBYE_SECONDS)

    async def _watch(self, stub: router_pb2_grpc.RouterServiceAsyncStub) -> None:
        epoch, reported = 0, ""
        while True:
            try:
                request = router_pb2.WatchPlacementRequest(known_epoch=epoch, weight_version=self._version)
                async for response in stub.WatchPlacement(request, metadata=self._metadata):
                    epoch, reported = response.placement.epoch, ""
                    self._on_view(read_placement(response.placement))
            except grpc.aio.AioRpcError as error:
                message = from_rpc_error(error).message
                if message != reported:  # not the same again at every attempt
                    log.warning("router %s: %s; the placement stays as it is", self._target, message)
                reported = message
            await asyncio.sleep(RETRY_SECONDS)

    async def _acknowledge(self, stub: router_pb2_grpc.RouterServiceAsyncStub) -> None:
        while True:
            self._moved.clear()
            await self._tell(stub)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), ACKNOWLEDGE_SECONDS)

    async def _tell(
        self, stub: router_pb2_grpc.RouterServiceAsyncStub, *, leaving: bool = False, seconds: float = REPORT_SECONDS
    ) -> None:
        request = router_pb2.AcknowledgeRequest(
            gateway_id=self._gateway_id, weight_version=self._version, epoch=self._used, leaving=leaving
        )
        try:
            await stub.Acknowledge(request, timeout=seconds, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            log.debug("the router does not know which epoch is used: %s", from_rpc_error(error).message)

    async def _report(self, stub: router_pb2_grpc.RouterServiceAsyncStub) -> None:
        since = time.monotonic()
        while True:
            counts = await self._counts.get()
            now = time.monotonic()
            request = router_pb2.ReportLoadRequest(
                gateway_id=self._gateway_id,
                weight_version=self._version,
                interval_ms=int(1e3 * (now - since)),
                layers=[
                    router_pb2.LayerCounts(layer=layer, rows=rows, reads=reads)
                    for layer, (rows, reads) in counts.items()
                ],
            )
            since = now
            try:
                await stub.ReportLoad(request, timeout=REPORT_SECONDS, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                log.debug("a report of load was lost: %s", from_rpc_error(error).message)


def read_placement(placement: router_pb2.Placement) -> RouterView:
    """What the router says, by address. Experts without a hash are left out: nobody holds them."""
    hashes = {each.layer: each.hashes for each in placement.hashes}

    def digest(layer: int, expert: int) -> bytes:
        return hashes.get(layer, b"")[expert * HASH_BYTES : (expert + 1) * HASH_BYTES]

    workers = {}
    for worker in placement.workers:
        experts = {
            (each.layer, expert): digest(each.layer, expert) for each in worker.experts for expert in each.experts
        }
        known = {key: each for key, each in experts.items() if any(each)}
        workers[worker.address] = PlacedWorker(worker.group, known, worker.row_ns, worker.read_ns)
    return RouterView(placement.epoch, workers)
