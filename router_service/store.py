"""Where routers keep what they know: workers under their leases, the state, the load. In memory, for one router alone.

What is lost with the process comes back: workers that are not known register again, within one heartbeat.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Protocol

from protos.router.v1 import router_pb2


class Store(Protocol):
    """Kept by one router, or shared by several. Raises NotReady where it cannot be reached."""

    async def put_worker(self, record: router_pb2.WorkerRecord, lease: float) -> None:
        """Keep a worker for ``lease`` seconds."""

    async def renew(self, worker_id: str, lease: float) -> bool:
        """Keep it for as long again; False when it is not there any more."""
        ...

    async def remove_worker(self, worker_id: str) -> None:
        """Forget a worker, if it is known."""

    async def workers(self) -> dict[str, router_pb2.WorkerRecord]:
        """Those whose leases have not ended."""
        ...

    async def lease_left(self, worker_id: str) -> float:
        """Seconds; 0 for a worker that is not there."""
        ...

    async def put_load(self, router_id: str, load: bytes, seconds: float) -> None:
        """Keep what one router has heard of the load for ``seconds``."""

    async def loads(self) -> list[bytes]:
        """What all routers have heard."""
        ...

    async def put_gateway(self, gateway_id: str, epoch: int, seconds: float) -> None:
        """Keep which epoch a gateway uses for ``seconds``; it is gone at once where that is 0."""

    async def gateways(self) -> dict[str, int]:
        """The epoch of every gateway that was heard of."""
        ...

    async def lead(self, seconds: float) -> bool:
        """Whether this router leads for the next ``seconds``; it does once nobody else does."""
        ...

    async def state(self) -> router_pb2.RouterState | None:
        """What was written last."""
        ...

    async def write_state(self, state: router_pb2.RouterState, expected: int) -> bool:
        """Replace the state of the epoch ``expected`` (0: none); False where that is not it, or another one leads."""
        ...

    async def generation(self) -> str:
        """Changes when what was kept may have been lost."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """For one router alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._generation = uuid.uuid4().hex
        self._workers: dict[str, tuple[router_pb2.WorkerRecord, float]] = {}  # with the end of its lease
        self._loads: dict[str, tuple[bytes, float]] = {}
        self._gateways: dict[str, tuple[int, float]] = {}  # epoch, with the time until which that is known
        self._state: router_pb2.RouterState | None = None

    async def put_worker(self, record: router_pb2.WorkerRecord, lease: float) -> None:
        self._workers[record.worker.description.worker_id] = record, self._clock() + lease

    async def renew(self, worker_id: str, lease: float) -> bool:
        known = (await self.workers()).get(worker_id)
        if known is not None:
            await self.put_worker(known, lease)
        return known is not None

    async def remove_worker(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    async def workers(self) -> dict[str, router_pb2.WorkerRecord]:
        now = self._clock()
        self._workers = {name: each for name, each in self._workers.items() if each[1] > now}
        return {name: record for name, (record, _) in self._workers.items()}

    async def lease_left(self, worker_id: str) -> float:
        found = self._workers.get(worker_id)
        return 0.0 if found is None else max(0.0, found[1] - self._clock())

    async def put_load(self, router_id: str, load: bytes, seconds: float) -> None:
        self._loads[router_id] = load, self._clock() + seconds

    async def loads(self) -> list[bytes]:
        now = self._clock()
        return [load for load, ends in self._loads.values() if ends > now]

    async def put_gateway(self, gateway_id: str, epoch: int, seconds: float) -> None:
        self._gateways[gateway_id] = epoch, self._clock() + seconds

    async def gateways(self) -> dict[str, int]:
        now = self._clock()
        self._gateways = {name: each for name, each in self._gateways.items() if each[1] > now}
        return {name: epoch for name, (epoch, _) in self._gateways.items()}

    async def lead(self, seconds: float) -> bool:  # noqa: ARG002 (the protocol's; there is nobody else)
        return True

    async def state(self) -> router_pb2.RouterState | None:
        return self._state

    async def write_state(self, state: router_pb2.RouterState, expected: int) -> bool:
        if (0 if self._state is None else self._state.placement.epoch) != expected:
            return False
        self._state = state
        return True

    async def generation(self) -> str:
        return self._generation

    async def close(self) -> None:
        pass
