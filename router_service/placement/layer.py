"""One layer: who holds its experts, and how their load falls on the workers.

Loads are in seconds of work per second, so a worker's level of 1 is one that never rests. Letters: E experts of the
layer, W workers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

SWEEPS, SETTLED = 16, 3e-3  # over the experts with several holders, until no level changes by so much of the mean


class Layer:
    """A placement that is being made. What workers have room for and must not hold together is looked at here alone."""

    def __init__(
        self,
        cost: Floats,
        held: Bools,
        limit: Ints,
        near: Bools,
        homes: Bools,
        doubt: Floats | None = None,
        able: Bools | None = None,
    ) -> None:
        """``cost`` [E, W], above 0: load of each expert if that worker had it alone.

        ``held`` [E, W] is changed in place. ``limit`` [W]: most experts of this layer. ``near`` [W, W]: pairs that must
        not both hold one expert, each worker with itself among them. ``homes`` [E, W]: where an expert may go.
        ``doubt`` [E]: variance of what is known of each expert's load, as part of its square; 0 by default.
        ``able`` [E, W]: where an expert could be at all, if need be; everywhere by default.
        """
        self.able = np.ones_like(held) if able is None else able
        self.cost, self.held, self.limit, self.near, self.homes = cost, held, limit, near, homes
        self._doubt = np.zeros(len(cost)) if doubt is None else doubt
        self._near, self._alone = near.astype(np.float32), int(near.sum()) == len(near)
        self.copies: Ints = held.sum(axis=1)  # [E]
        self.taken: Ints = held.sum(axis=0)  # [W]
        self.share = np.zeros_like(cost)  # [E, W] part of each expert's load that its holders get; sums to 1
        self.level = np.zeros(len(limit))  # [W]
        self.mean = float(self.sizes().mean() * len(cost) / len(limit)) if cost.size else 0.0
        self.pour_all()

    def sizes(self) -> Floats:
        """What each expert would cost an average worker [E]; ``mean`` is the level if all were equally busy."""
        most = self.cost.max(axis=1)
        speed = np.divide(most[:, None], self.cost, out=np.ones_like(self.cost), where=self.cost > 0).mean(axis=0)
        found: Floats = most / speed.mean()
        return found

    def noise(self) -> float:
        """Standard deviation of the level of the worker of which least is known."""
        return float(np.sqrt(((self.share * self.cost) ** 2 * self._doubt[:, None]).sum(axis=0)).max(initial=0.0))

    @property
    def room(self) -> Ints:
        """How many more experts each worker may take [W]."""
        return self.limit - self.taken

    def crowd(self, experts: slice | Ints = slice(None)) -> NDArray[np.float32]:
        """For each of ``experts`` how many copies are where they keep a worker [W] from taking another one."""
        held = self.held[experts].astype(np.float32)
        return held if self._alone else held @ self._near

    def allowed(self, expert: int) -> Bools:
        """Workers [W] that may hold one more copy, if they had room."""
        held = self.held[expert]
        taken: Bools = held if self._alone else self.near[held].any(axis=0)
        free: Bools = ~taken & self.homes[expert]
        return free

    def add(self, expert: int, worker: int) -> None:
        """One more copy, which gets its part of the load."""
        self._put(expert, worker, True)
        self.pour(expert)

    def drop(self, expert: int, worker: int) -> None:
        """One copy less; the others get its load."""
        self._put(expert, worker, False)
        self.pour(expert)

    def exchange(self, expert: int, worker: int, other: int, place: int) -> None:
        """``worker`` has ``expert`` and ``place`` has ``other``; then it is the other way round."""
        for each, old, new in ((other, place, worker), (expert, worker, place)):
            self._put(each, old, False)
            self._put(each, new, True)
            self.pour(each)

    def hold(self, held: Bools) -> None:
        """Exactly ``held`` [E, W]."""
        self.held[:] = held
        self.copies, self.taken = held.sum(axis=1), held.sum(axis=0)
        self.pour_all()

    def _put(self, expert: int, worker: int, there: bool) -> None:
        change = int(there) - int(self.held[expert, worker])
        self.held[expert, worker] = there
        self.copies[expert] += change
        self.taken[worker] += change

    def pour_all(self) -> None:
        """Split all load anew: what has one holder first, then large ones before small ones."""
        self.share = np.where(self.copies[:, None] == 1, self.held, 0).astype(float)
        self.level = (self.share * self.cost).sum(axis=0)
        self.settle()

    def settle(self) -> None:
        """Split the load of the experts that have several holders again, until it hardly changes any more."""
        several = np.flatnonzero(self.copies > 1)
        order = several[np.argsort(-self.cost[several].max(axis=1), kind="stable")].tolist()
        for _ in range(SWEEPS if order else 0):
            before = self.level.copy()
            for expert in order:
                self.pour(expert)
            if np.abs(self.level - before).max() <= SETTLED * self.mean:
                break

    def pour(self, expert: int) -> None:
        """Split the expert's load over its holders so that the busiest of them ends as low as it can."""
        share, cost = self.share[expert], self.cost[expert]
        self.level -= share * cost
        share.fill(0)
        holders = self.held[expert].nonzero()[0]
        if len(holders) == 1:
            share[holders[0]] = 1
            self.level[holders[0]] += cost[holders[0]]
        elif len(holders):
            costs, levels = cost[holders], self.level[holders]
            parts = np.array(_water_fill(levels.tolist(), costs.tolist()))
            share[holders] = parts
            self.level[holders] = levels + parts * costs


def _water_fill(level: list[float], cost: list[float]) -> list[float]:
    """Parts x, which sum to 1, with max(level + x * cost) as low as it can be. Plain floats: there are few."""
    if not all(cost):  # nobody asks for the expert
        return [1 / len(cost)] * len(cost)
    height, volume, width = 0.0, 1.0, 0.0
    for place in sorted(range(len(level)), key=level.__getitem__):
        if width and height <= level[place]:
            break
        volume += level[place] / cost[place]
        width += 1 / cost[place]
        height = volume / width
    return [max(0.0, height - bottom) / each for bottom, each in zip(level, cost, strict=True)]
