"""Which arena steps go through: opened for the workers there are, left when it breaks or they change.

While there is none, steps go the ordinary way, frame by frame. Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from consilium.errors import ConsiliumError, DeadlineExceeded
from consilium.gpu.arena import MOST_WORKERS, ArenaShape
from consilium.gpu.device_memory import device_uuid
from consilium.model_config import ModelConfig
from consilium.mps import is_serving
from gateway.device_hop import DeviceHop, Member, owners_of
from gateway.placement import Placement

log = logging.getLogger(__name__)

REST_SECONDS = 30.0  # that a worker is left out which could not be waited for
MOST_RETIRED = 4  # arenas that somebody might still have


class DeviceWorker(Member, Protocol):
    """As much of a WorkerConnection as is looked at."""

    @property
    def identity(self) -> str: ...

    @property
    def device_uuid(self) -> str: ...


class DeviceHops:
    """At most one arena that can be used now."""

    def __init__(
        self,
        model: ModelConfig,
        tokens: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        device: torch.device,
        seconds: float,
        audit: float = 0.0,
    ) -> None:
        """For steps of at most ``tokens``; ``dtypes`` are of rows and replies; a worker is waited for ``seconds``.

        ``audit`` is the share of steps that go both ways, to compare them.
        """
        self._model, self._tokens, self._dtypes, self._device, self._seconds = model, tokens, dtypes, device, seconds
        self._uuid, self._layers = device_uuid(device), model.expert_layers()
        self._shared = device.type != "cuda" or is_serving()  # whether two processes can use this device at once
        self.audit, self._chance = audit, random.SystemRandom()  # nobody shall know which
        self._placement, self._workers = Placement(), dict[str, DeviceWorker]()
        self._hop: DeviceHop | None = None
        self._taking_part: dict[str, str] = {}  # identities by address, of those in the arena
        self._opening: set[str] = set()  # addresses that have not answered yet
        self._resting: dict[str, float] = {}  # until when, by identity
        self._retired: list[DeviceHop] = []
        self._changed, self._said = False, ""

    def follow(self, placement: Placement, workers: Mapping[str, DeviceWorker]) -> None:
        """From the next step on use these workers for what they hold."""
        self._placement, self._workers, self._changed = placement, dict(workers), True

    def current(self) -> DeviceHop | None:
        """Between two steps: what the next one goes through; None: the ordinary way."""
        now = time.monotonic()
        if self._opening and self._hop is not None and now > self._hop.expires:
            self.failed(dict.fromkeys(self._opening, DeadlineExceeded("it was not ready in time")))
        rested = {who for who, until in self._resting.items() if until <= now}
        for each in rested:
            del self._resting[each]
        if rested or self._changed:
            self._changed = False
            self._arrange()
        return None if self._opening else self._hop

    def audits(self) -> bool:
        """Whether the step that has just gone through shall be compared with the other way."""
        return self._chance.random() < self.audit

    def failed(self, lost: Mapping[str, Exception]) -> None:
        """A step came to nothing because of these workers: go on without them for a while."""
        for address, error in lost.items():
            log.warning("a step on the device came to nothing: %s: %s", address or "this gateway", error)
            self._rest(address)
        self._retire()

    def close(self) -> None:
        """Free everything; the workers must be gone, or have been told of another arena."""
        self._retire()
        self._free()

    def _arrange(self) -> None:
        """Keep the arena if its members can do all that is needed, else open one with whoever can."""
        members = {
            address: worker.identity
            for address, worker in sorted(self._workers.items())
            if self._reaches(worker) and worker.identity not in self._resting
        }
        owners = owners_of(self._placement, list(members), self._layers, self._model.num_experts)
        if self._hop is not None and self._taking_part == members and owners is not None:
            self._hop.place(owners)
            return
        self._retire()
        if owners is None or len(members) > MOST_WORKERS:
            return
        try:
            self._hop = DeviceHop(self._shape(len(members)), [self._workers[each] for each in members], *self._how())
        except ConsiliumError as error:
            self._say(f"no memory for an arena on the device: {error.message}")
            return
        self._taking_part, self._opening = members, set(members)
        self._hop.place(owners)
        hop = self._hop
        hop.open(lambda address, error: self._opened(hop, address, error))

    def _opened(self, hop: DeviceHop, address: str, error: Exception | None) -> None:
        """One worker has said whether it is ready."""
        if hop is not self._hop:
            return
        if error is not None:
            log.warning("worker %s computes no steps on the device: %s", address, error)
            self._rest(address)
            self._retire()
            return
        self._opening.discard(address)
        if not self._opening:
            hop.start()
            self._free()
            log.info("steps go through the device's memory to %s", ", ".join(self._taking_part))

    def _reaches(self, worker: DeviceWorker) -> bool:
        """Another GPU of this machine, or the same one where two processes can use it at once."""
        if not worker.device_uuid:
            return False
        if worker.device_uuid != self._uuid or self._shared:
            return True
        self._say(
            "workers share this gateway's GPU without MPS, so that steps go through the host: start "
            "`nvidia-cuda-mps-control -d` before gateway and workers (`consilium up` does)"
        )
        return False

    def _rest(self, address: str) -> None:
        if address in self._taking_part:
            self._resting[self._taking_part[address]] = time.monotonic() + REST_SECONDS

    def _retire(self) -> None:
        """Nobody waits in the arena any more; its memory stays until nobody can have it."""
        if self._hop is not None:
            self._hop.abort()
            self._retired.append(self._hop)
        self._hop, self._taking_part, self._opening, self._changed = None, {}, set(), True
        while len(self._retired) > MOST_RETIRED:
            self._retired.pop(0).close()

    def _free(self) -> None:
        """Whoever could have the old arenas has left them for the new one, or is gone."""
        while self._retired:
            self._retired.pop().close()

    def _shape(self, workers: int) -> ArenaShape:
        model = self._model
        sizes = len(self._layers), model.num_experts, self._tokens, model.top_k, model.hidden_size, workers
        return ArenaShape(*sizes, *self._dtypes)

    def _how(self) -> tuple[torch.device, float]:
        return self._device, self._seconds

    def _say(self, what: str) -> None:
        """Once."""
        if what != self._said:
            log.warning(what)
            self._said = what
