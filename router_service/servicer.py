"""The gRPC face of a router. Whatever it is told goes to the store; the controller makes something of it."""

# ruff: noqa: N802, ARG002 (gRPC's method names and signatures)

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc

from consilium.config import RouterConfig
from consilium.errors import InvalidRequest, UnknownModel
from protos.router.v1 import router_pb2, router_pb2_grpc
from router_service.controller import Controller
from router_service.deployment import Deployment
from router_service.holdings import expert_sets, pairs_of
from router_service.load import DecayedLoad, pack
from router_service.store import Store

HEARTBEATS_PER_LEASE = 5
LOAD_HALF_LIVES = 8  # after so many nothing of a load is left to speak of
GONE_SECONDS = 0.001  # for which a gateway that goes is remembered
_GATEWAY_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
Context = grpc.aio.ServicerContext[Any, Any]


class UnknownWorker(UnknownModel):
    """The worker's lease has ended, or the router was started anew."""


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Answers from the store and from the state that the controller keeps."""

    def __init__(
        self,
        deployment: Deployment,
        config: RouterConfig,
        store: Store,
        controller: Controller,
        tokens: Mapping[str, bytes],
    ) -> None:
        """``tokens`` are the digests that workers are told: of those whom they shall answer."""
        self._deployment, self._config, self._store, self._controller = deployment, config, store, controller
        self._tokens = tokens
        self._load = DecayedLoad(deployment.layers, deployment.experts, config.load_half_life)
        self._router_id = uuid.uuid4().hex

    async def GetDeployment(
        self, request: router_pb2.GetDeploymentRequest, context: Context
    ) -> router_pb2.GetDeploymentResponse:
        return self._deployment.describe()

    async def Register(self, request: router_pb2.RegisterRequest, context: Context) -> router_pb2.RegisterResponse:
        record = router_pb2.WorkerRecord(worker=request.worker, held=request.held, failed=request.failed)
        worker_id = record.worker.description.worker_id
        others = await self._store.workers()
        for name, other in list(others.items()):
            if name != worker_id and other.worker.address == record.worker.address:  # it has started again
                await self._store.remove_worker(name)
                del others[name]
        self._deployment.check(record, (other for name, other in others.items() if name != worker_id))
        await self._store.put_worker(record, self._config.lease)
        self._controller.poke()
        return router_pb2.RegisterResponse(orders=self._orders(record), token_digests=self._tokens)

    async def Heartbeat(self, request: router_pb2.HeartbeatRequest, context: Context) -> router_pb2.HeartbeatResponse:
        workers = await self._store.workers()
        record = workers.get(request.worker_id)
        if record is None or not await self._store.renew(request.worker_id, self._config.lease):
            raise UnknownWorker("this worker is not known (any more); register again")
        if request.HasField("held"):
            others = [other for name, other in workers.items() if name != request.worker_id]
            self._deployment.check_held(request.held.layers, others)
            del record.held[:]
            record.held.extend(request.held.layers)
            del record.failed[:]
            record.failed.extend(request.held.failed)
            await self._store.put_worker(record, self._config.lease)
            self._controller.poke()
        return router_pb2.HeartbeatResponse(orders=self._orders(record))

    async def Drain(self, request: router_pb2.DrainRequest, context: Context) -> router_pb2.DrainResponse:
        workers = await self._store.workers()
        record = workers.get(request.worker_id)
        if record is None:
            return router_pb2.DrainResponse(done=True)
        if not record.draining:
            record.draining = True
            await self._store.put_worker(record, self._config.lease)
            self._controller.poke()
        state = self._controller.state
        # What gateways may ask it for, or might still do because they have not heard that they shall not.
        needed = next((pairs_of(each.experts) for each in state.wanted if each.worker_id == request.worker_id), None)
        if not needed or all(each.draining for each in workers.values()):  # or the whole deployment stops
            await self._store.remove_worker(request.worker_id)
            return router_pb2.DrainResponse(done=True)
        placed = state.placement.workers
        elsewhere = [pairs_of(each.experts) for each in placed if each.worker_id != request.worker_id]
        return router_pb2.DrainResponse(done=False, last_copies=len(needed.difference(*elsewhere)))

    async def Acknowledge(
        self, request: router_pb2.AcknowledgeRequest, context: Context
    ) -> router_pb2.AcknowledgeResponse:
        if not _GATEWAY_ID.fullmatch(request.gateway_id):
            raise InvalidRequest("a gateway must name itself with 1 to 64 letters and digits")
        seconds = GONE_SECONDS if request.leaving else self._config.gateway_lease
        await self._store.put_gateway(request.gateway_id, request.epoch, seconds)
        return router_pb2.AcknowledgeResponse()

    async def ReportLoad(
        self, request: router_pb2.ReportLoadRequest, context: Context
    ) -> router_pb2.ReportLoadResponse:
        self._load.add(request)
        ttl = LOAD_HALF_LIVES * self._config.load_half_life
        await self._store.put_load(self._router_id, pack(self._load.demand()), ttl)
        return router_pb2.ReportLoadResponse()

    # The generated stub knows generators only.
    async def WatchPlacement(
        self, request: router_pb2.WatchPlacementRequest, context: Context
    ) -> AsyncIterator[router_pb2.WatchPlacementResponse]:
        async for placement in self._controller.watch(request.known_epoch):
            yield router_pb2.WatchPlacementResponse(placement=placement)

    async def GetPlacement(
        self, request: router_pb2.GetPlacementRequest, context: Context
    ) -> router_pb2.GetPlacementResponse:
        workers, state = await self._store.workers(), self._controller.state
        wanted = {each.worker_id: len(pairs_of(each.experts)) for each in state.wanted}
        states = [
            router_pb2.WorkerState(
                worker=record.worker,
                held=len(pairs_of(record.held)),
                wanted=wanted.get(name, 0),
                lease_left_ms=int(1e3 * await self._store.lease_left(name)),
                draining=record.draining,
                failed=len(pairs_of(record.failed)),
            )
            for name, record in sorted(workers.items())
        ]
        demand = self._controller.demand
        return router_pb2.GetPlacementResponse(
            placement=state.placement,
            workers=states,
            loads=[
                router_pb2.LayerLoad(layer=layer, rows=rows, reads=reads)
                for layer, rows, reads in zip(demand.layers, demand.rows, demand.reads, strict=True)
            ],
            leader=self._controller.leads,
            lease_ms=int(1e3 * self._config.lease),
            missing=self._controller.missing,
            balance=await asyncio.to_thread(self._controller.balance),
            gateways=[
                router_pb2.GatewayState(gateway_id=name, epoch=epoch)
                for name, epoch in sorted((await self._store.gateways()).items())
            ],
        )

    def _orders(self, record: router_pb2.WorkerRecord) -> router_pb2.Orders:
        """What the worker shall hold; what it holds already, until that is decided."""
        name, lease = record.worker.description.worker_id, int(1e3 * self._config.lease)
        planned = next((each.experts for each in self._controller.state.wanted if each.worker_id == name), None)
        wanted = expert_sets(pairs_of(record.held)) if planned is None else planned
        return router_pb2.Orders(lease_ms=lease, interval_ms=lease // HEARTBEATS_PER_LEASE, wanted=wanted)
