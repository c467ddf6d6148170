"""What this gateway knows of the workers it may choose from: how fast each was, and what it has to do. No I/O.

Letters: W workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

# Reading an expert's weights costs a worker about as much as computing this many rows of it.
EXPERT_COST = 8
# µs that a frame more costs the gateway's own thread: built, sent, awaited, taken in.
FRAME_COST = 50.0
WEIGHT = 0.1  # of the newest frame in a worker's mean

NOBODY: Mapping[str, float] = MappingProxyType({})
COSTS = np.array([EXPERT_COST, FRAME_COST])


class Fleet:
    """Arrays over the workers of a placement, in the order of their addresses, as kernels read them."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}
        self.work = np.zeros(0)  # [W] rows in flight, reading of experts included
        self._speed = np.zeros(0)  # [W] µs for each of them, as measured; 0 where nothing was
        self._stated = np.zeros(0)  # [W] the same, as the router knows it; 0 where it does not
        self.unit = np.ones(0)  # [W] the same, and a guess where nothing was measured
        self.standing = np.zeros(0, np.int8)  # [W] as consilium.kernels.routing.assign has it

    def arrange(self, addresses: Iterable[str], stated: Mapping[str, float] = NOBODY) -> None:
        """Have these workers from now on; what is known of those that stay is kept.

        ``stated`` is how many µs a row takes them by what the router knows.
        """
        before, work, speed = self.index, self.work, self._speed
        self.index = {address: place for place, address in enumerate(addresses)}
        self.work, self._speed = np.zeros(len(self.index)), np.zeros(len(self.index))
        self.standing = np.zeros(len(self.index), np.int8)
        self._stated = np.array([stated.get(address, 0.0) for address in self.index])
        for address, place in self.index.items():
            if address in before:
                self.work[place], self._speed[place] = work[before[address]], speed[before[address]]
        self._guess()

    @property
    def load(self) -> NDArray[np.float64]:
        """µs of work that each worker has in flight for this gateway [W]."""
        return self.work * self.unit

    def doubt(self, address: str, *, doubtful: bool) -> None:
        """Whether a worker is asked only where nobody better holds an expert."""
        place = self.index.get(address)
        if place is not None:
            self.standing[place] = doubtful

    def sent(self, address: str, size: int) -> None:
        """A frame of this size (see :func:`frame_size`) is on its way."""
        place = self.index.get(address)
        if place is not None:
            self.work[place] += size

    def ended(self, address: str, size: int, compute_us: int = 0) -> None:
        """The frame is answered, or given up; ``compute_us`` is what the worker says that it took."""
        place = self.index.get(address)
        if place is None:
            return
        self.work[place] = max(0.0, self.work[place] - size)
        if compute_us:
            known, new = self._speed[place], compute_us / size
            self._speed[place] = known + WEIGHT * (new - known) if known else new
            if known:
                self.unit[place] = self._speed[place]
            else:
                self._guess()

    def _guess(self) -> None:
        """Workers that were not measured are as fast against the others as the router says.

        Those of which it knows nothing count as fast as the fastest: so they are tried.
        """
        known, both = self._speed[self._speed > 0], (self._speed > 0) & (self._stated > 0)
        factor = (self._speed[both] / self._stated[both]).min() if both.any() else 1.0
        fastest = known.min() if known.size else 1.0
        guess = np.where(self._stated > 0, factor * self._stated, fastest)
        self.unit = np.where(self._speed > 0, self._speed, guess)


def frame_size(experts: int, rows: int) -> int:
    """Of a frame with so many experts and rows, in rows."""
    return EXPERT_COST * experts + rows
