"""Which of the router's placements a gateway uses while it moves from one to the next. Pure; no I/O.

A new placement may name workers that are not connected yet. Until all of them are, what the former one named is asked
where the new one has nobody who answers; only then the gateway tells the router that the former one is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gateway.fleet import frame_size

Expert = tuple[int, int]  # layer, expert


@dataclass(frozen=True, slots=True)
class PlacedWorker:
    """What gateways may ask one worker for, with the content hash of each expert, and how fast it is."""

    group: str
    experts: Mapping[Expert, bytes]
    row_ns: int = 0  # to compute one row of one expert; 0 where that is not known
    read_ns: int = 0  # beside that, for every expert that a frame asks for

    @property
    def row_us(self) -> float:
        """µs that one row of :func:`gateway.fleet.frame_size` takes it, in a frame with one row of an expert."""
        return (self.row_ns + self.read_ns) / 1e3 / frame_size(1, 1)


@dataclass(frozen=True, slots=True)
class RouterView:
    """One epoch of the router's."""

    epoch: int
    workers: Mapping[str, PlacedWorker]  # by address


class Epochs:
    """The newest placement, and the last one of which every worker was reached."""

    def __init__(self) -> None:
        self._newest = self._reached = RouterView(0, {})

    @property
    def workers(self) -> dict[str, PlacedWorker]:
        """Everybody to be connected to, by address."""
        return {**self._reached.workers, **self._newest.workers}

    def take(self, view: RouterView) -> None:
        """The router says so from now on."""
        self._newest = view

    def held(self, connected: Collection[str]) -> dict[str, Mapping[Expert, bytes]]:
        """What those that are ``connected`` may be asked for."""
        held = {address: dict(each.experts) for address, each in self._newest.workers.items() if address in connected}
        if self._reached is not self._newest:
            known = set().union(*held.values())
            for address, each in self._reached.workers.items():
                if address in connected:
                    kept = {expert: digest for expert, digest in each.experts.items() if expert not in known}
                    held.setdefault(address, {}).update(kept)
        return {**held}

    def reach(self, connected: Collection[str]) -> int | None:
        """The epoch that is reached now, where it was not before."""
        if self._reached is self._newest or not self._newest.workers.keys() <= set(connected):
            return None
        self._reached = self._newest
        return self._newest.epoch
