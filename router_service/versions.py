"""One router for several versions of the weights: each has workers, gateways, a state and a placement of its own.

A gateway and a worker are of one version as long as they live, so a request stays on the version it started with.
"""

# ruff: noqa: N802 (gRPC's method names)

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from consilium.errors import ConfigError, InvalidRequest
from protos.router.v1 import router_pb2, router_pb2_grpc
from router_service.controller import Controller
from router_service.servicer import Context, RouterServicer
from router_service.store import Store

logger = logging.getLogger(__name__)

MOST = 4  # versions at once
_NAME = re.compile(r"[A-Za-z0-9._-]{0,64}")


@dataclass(frozen=True, slots=True)
class Version:
    """What a router has for one version."""

    store: Store
    controller: Controller
    servicer: RouterServicer
    leading: asyncio.Task[None]

    async def close(self) -> None:
        self.leading.cancel()
        await asyncio.gather(self.leading, return_exceptions=True)
        await self.store.close()


class Versions(router_pb2_grpc.RouterServiceServicer):
    """Hands every request to its version; one that is new begins with nothing."""

    def __init__(self, make: Callable[[str], Version]) -> None:
        """``make`` starts a version."""
        self._make = make
        self._known = {"": make("")}
        self.failed = asyncio.Event()  # a controller has ended, which it never should
        self._watch(self._known[""])

    def controllers(self) -> dict[str, Controller]:
        """By version."""
        return {name: each.controller for name, each in list(self._known.items())}

    async def close(self) -> None:
        for each in self._known.values():
            await each.close()

    async def GetDeployment(
        self, request: router_pb2.GetDeploymentRequest, context: Context
    ) -> router_pb2.GetDeploymentResponse:
        return await (await self._of(request.weight_version)).GetDeployment(request, context)

    async def Register(self, request: router_pb2.RegisterRequest, context: Context) -> router_pb2.RegisterResponse:
        return await (await self._of(request.worker.description.weight_version)).Register(request, context)

    async def Heartbeat(self, request: router_pb2.HeartbeatRequest, context: Context) -> router_pb2.HeartbeatResponse:
        return await (await self._of(request.weight_version)).Heartbeat(request, context)

    async def Drain(self, request: router_pb2.DrainRequest, context: Context) -> router_pb2.DrainResponse:
        return await (await self._of(request.weight_version)).Drain(request, context)

    async def Acknowledge(
        self, request: router_pb2.AcknowledgeRequest, context: Context
    ) -> router_pb2.AcknowledgeResponse:
        return await (await self._of(request.weight_version)).Acknowledge(request, context)

    async def ReportLoad(
        self, request: router_pb2.ReportLoadRequest, context: Context
    ) -> router_pb2.ReportLoadResponse:
        return await (await self._of(request.weight_version)).ReportLoad(request, context)

    async def GetPlacement(
        self, request: router_pb2.GetPlacementRequest, context: Context
    ) -> router_pb2.GetPlacementResponse:
        answer = await (await self._of(request.weight_version)).GetPlacement(request, context)
        answer.weight_versions.extend(sorted(self._known))
        return answer

    # The generated stub knows generators only.
    async def WatchPlacement(
        self, request: router_pb2.WatchPlacementRequest, context: Context
    ) -> AsyncIterator[router_pb2.WatchPlacementResponse]:
        async for response in (await self._of(request.weight_version)).WatchPlacement(request, context):
            yield response

    async def _of(self, name: str) -> RouterServicer:
        """Raises InvalidRequest for what is no name, ConfigError where there are too many."""
        if name not in self._known:
            if not _NAME.fullmatch(name):
                raise InvalidRequest("weight_version must be at most 64 letters, digits, dots, dashes and underscores")
            await self._make_room()
            logger.info("weights of version %r are new here", name)
            self._known[name] = self._make(name)
            self._watch(self._known[name])
        return self._known[name].servicer

    async def _make_room(self) -> None:
        """Forget a version that nobody serves or asks for any more."""
        idle = [name for name, each in self._known.items() if name and not each.controller.records]
        gone = next((name for name in idle if not self._known[name].controller.gateways), None)
        if len(self._known) >= MOST and gone is None:
            raise ConfigError(f"refused: {MOST} versions of the weights are served already; let one of them end first")
        if len(self._known) >= MOST and gone is not None:
            await self._known.pop(gone).close()

    def _watch(self, version: Version) -> None:
        version.leading.add_done_callback(lambda task: None if task.cancelled() else self.failed.set())
