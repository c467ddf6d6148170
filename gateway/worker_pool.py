"""All workers of the configured groups: which addresses there are, who is connected, and who holds what.

Runs on the I/O thread; the engine gets immutable views through its mailbox.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from consilium.config import ExpertGroupConfig, RouterConfig, split_endpoint
from consilium.model_config import ModelConfig
from gateway.epochs import Epochs, PlacedWorker, RouterView
from gateway.mailbox import Mailbox
from gateway.messages import WorkerStatus
from gateway.placement import ExpertIdentity, Placement, build_placement
from gateway.router_link import RouterLink
from gateway.worker_connection import REFUSED, Expectations, WorkerConnection

log = logging.getLogger(__name__)

ROUTER = "the router"  # where an address comes from that no endpoint names
RESOLVE_INTERVAL = 5.0  # seconds between looks at what a name resolves to


@dataclass(frozen=True, slots=True)
class View:
    """The workers at one moment."""

    placement: Placement
    workers: Mapping[str, WorkerConnection]  # those that may be sent frames, by address
    statuses: list[WorkerStatus]
    identities: Mapping[tuple[int, int], ExpertIdentity]  # of the experts that all their holders compute alike
    stated: Mapping[str, float]  # by address: µs of a row as the router knows it; 0 where it does not


class WorkerPool:
    """Keeps a connection to every address that the endpoints resolve to."""

    def __init__(
        self,
        groups: Mapping[str, ExpertGroupConfig],
        max_frame: int,
        model: ModelConfig,
        expectations: Expectations,
        mailbox: Mailbox,
        router: RouterConfig | None = None,
    ) -> None:
        """With a ``router`` it says where workers are and what they are asked for; endpoints are not looked at."""
        self._groups, self._max_frame, self._model = groups, max_frame, model
        self._expectations, self._mailbox = expectations, mailbox
        self._connections: dict[str, WorkerConnection] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._named_by: dict[str, set[str]] = {}  # the endpoints that resolve to each address
        self._unresolved: dict[str, WorkerStatus] = {}
        self.router = None if router is None else RouterLink(router, self._follow, expectations)
        self._closing: set[asyncio.Future[None]] = set()
        self._epochs = Epochs()  # what the router says

    async def run(self) -> None:
        """Follow the endpoints until cancelled, then close every connection."""
        endpoints = [(name, group, each) for name, group in self._groups.items() for each in group.endpoints]
        watches: list[Coroutine[Any, Any, object]] = []
        watches += [self.router.run()] if self.router else [self._watch(*each) for each in endpoints]
        self._publish()
        try:
            await asyncio.gather(*watches or [asyncio.Event().wait()])  # without endpoints there is nothing to follow
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _watch(self, group: str, config: ExpertGroupConfig, endpoint: str) -> None:
        """Open and close connections as the addresses behind one endpoint come and go."""
        host, port = split_endpoint(endpoint)
        known: set[str] = set()
        while True:
            try:
                found = await self._resolve(host, port)
            except OSError as error:  # keep what was known: a name server may be away for a moment
                log.warning("cannot resolve %s: %s", endpoint, error)
                if not known:
                    self._unresolved[endpoint] = WorkerStatus(group, endpoint, False, f"does not resolve: {error}")
                    self._publish()
            else:
                self._unresolved.pop(endpoint, None)
                for address in sorted(found - known):
                    self._open(group, config, endpoint, address)
                for address in known - found:
                    await self._close(endpoint, address)
                known = found
            await asyncio.sleep(RESOLVE_INTERVAL)

    def _follow(self, view: RouterView) -> None:
        """Take one epoch of the router's: connect to who is new, part with who is gone."""
        known = self._epochs.workers
        self._epochs.take(view)
        for address in sorted(view.workers.keys() - known.keys()):
            group = view.workers[address].group
            limits = self._groups.get(group, ExpertGroupConfig(endpoint=f"grpc://{address}"))
            self._open(group, limits, ROUTER, address)
        self._part(known)
        self._publish()

    def _part(self, known: Mapping[str, PlacedWorker]) -> None:
        """Close connections to those of ``known`` that the router does not name any more."""
        for address in known.keys() - self._epochs.workers.keys():
            closing = asyncio.ensure_future(self._close(ROUTER, address))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    @staticmethod
    async def _resolve(host: str, port: int) -> set[str]:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        hosts = {(family, str(address[0])) for family, _, _, _, address in infos}
        if len({family for family, _ in hosts}) > 1:  # one process often listens on both; it is one replica
            hosts = {each for each in hosts if each[0] == socket.AF_INET}
        return {f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}" for family, host in hosts}

    def _open(self, group: str, config: ExpertGroupConfig, endpoint: str, address: str) -> None:
        self._named_by.setdefault(address, set()).add(endpoint)
        if address in self._connections:
            first = self._connections[address].group
            log.warning("%s is %s, which group %s names too: that group's limits hold", endpoint, address, first)
        else:
            connection = WorkerConnection(
                group, address, config, self._max_frame, self._expectations, self._mailbox, self._publish
            )
            self._connections[address] = connection
            self._tasks[address] = asyncio.ensure_future(connection.run())

    async def _close(self, endpoint: str, address: str) -> None:
        self._named_by[address].discard(endpoint)
        if self._named_by[address] or address not in self._tasks:
            return
        task = self._tasks.pop(address)
        del self._connections[address]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._publish()

    def _publish(self) -> None:
        usable = {address: each for address, each in self._connections.items() if each.description is not None}
        hashes: dict[tuple[int, int], bytes] = {}
        classes: dict[tuple[int, int], set[str]] = {}
        held: dict[str, list[tuple[int, int]]] = {}
        details = {address: each.detail for address, each in self._connections.items()}
        placed = None if self.router is None else self._epochs.held(usable)
        for address, connection in list(usable.items()):
            experts = self._known(_described(connection) if placed is None else placed.get(address, {}))
            odd = next((each for each, digest in experts.items() if hashes.get(each, digest) != digest), None)
            if odd is not None:
                details[address] = f"{REFUSED}its weights of expert {odd[1]} of layer {odd[0]} differ from a replica's"
                del usable[address]
                continue
            hashes.update(experts)
            held[address] = list(experts)
            for expert in experts:
                classes.setdefault(expert, set()).add(connection.numerics_class)
        statuses = [
            WorkerStatus(
                each.group, address, address in usable, details[address], len(held.get(address, ())), each.transport
            )
            for address, each in self._connections.items()
        ]
        identities = {
            expert: ExpertIdentity(hashes[expert], *found) for expert, found in classes.items() if len(found) == 1
        }
        stated = {address: each.row_us for address, each in self._epochs.workers.items()}
        statuses += self._unresolved.values()
        self._mailbox.post(View(build_placement(held), usable, statuses, identities, stated))
        self._acknowledge(usable)

    def _acknowledge(self, usable: Collection[str]) -> None:
        """Once everybody whom the router names is connected, and the engine knows, what was before is not needed."""
        known = self._epochs.workers
        epoch = self._epochs.reach(usable)
        if self.router is not None and epoch is not None:
            self._part(known)
            self.router.acknowledge(epoch)

    def _known(self, experts: Mapping[tuple[int, int], bytes]) -> dict[tuple[int, int], bytes]:
        """Without experts that the model does not have."""
        layers, count = self._model.num_layers, self._model.num_experts
        return {
            (each, number): digest for (each, number), digest in experts.items() if each < layers and number < count
        }


def _described(connection: WorkerConnection) -> dict[tuple[int, int], bytes]:
    """What a worker said it held when it was connected, with content hashes."""
    description = connection.description
    if description is None:
        return {}
    return {
        (layer.layer, expert): digest
        for layer in description.layers
        for expert, digest in zip(layer.experts, layer.hashes, strict=False)
    }
