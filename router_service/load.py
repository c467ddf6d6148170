"""How much is asked of every expert: reports of gateways, of which each counts half after a while.

Letters: L layers that route, E experts in each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium.errors import InvalidRequest
from protos.router.v1 import router_pb2
from router_service.placement import Demand

# Rows that a layer must have been asked for, per expert, before its counts say more than chance.
ENOUGH_ROWS = 32


class DecayedLoad:
    """Sums of what was reported here, each report weighing 2^(-age / half-life), and how far they can be trusted.

    A sum's variance is that of its reports: how far each one was from the shares that all of them together have. So
    chance counts, and texts that come and go. It is taken to be at least that of independent rows.
    """

    def __init__(
        self, layers: Sequence[int], experts: int, half_life: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layers = {layer: place for place, layer in enumerate(layers)}
        self._half_life, self._clock = half_life, clock
        self._sums = np.zeros((2, len(layers), experts))  # rows and reads, as of `_at`
        self._variance = np.zeros((len(layers), experts))  # of the sums of rows
        self._at = clock()

    def add(self, report: router_pb2.ReportLoadRequest) -> None:
        """Count one report. Raises InvalidRequest for one that is not about this model."""
        experts = self._sums.shape[2]
        for counts in report.layers:
            if counts.layer not in self._layers or len(counts.rows) != experts or len(counts.reads) != experts:
                raise InvalidRequest(f"layer {counts.layer}: counts of {experts} experts were expected")
        self._decay()
        for counts in report.layers:
            place, rows = self._layers[counts.layer], np.array(counts.rows, float)
            self._sums[:, place] += np.stack([rows, np.array(counts.reads, float)])
            expected = self._sums[0, place] * (rows.sum() / max(self._sums[0, place].sum(), 1.0))
            self._variance[place] += np.maximum((rows - expected) ** 2, rows)

    def demand(self) -> Demand:
        """Per second."""
        self._decay()
        # Of something constant, the sum of all reports is rate * half-life / ln 2, once they are old enough.
        per_second = math.log(2) / self._half_life
        rows, reads = self._sums * per_second
        return Demand(tuple(self._layers), rows, reads, self._variance * per_second**2)

    def _decay(self) -> None:
        now = self._clock()
        fading = 2.0 ** (-(now - self._at) / self._half_life)
        self._sums *= fading
        self._variance *= fading**2
        self._at = now


def enough(demand: Demand, half_life: float) -> bool:
    """Whether the counts behind ``demand`` say more than chance, in every layer."""
    rows = demand.rows.sum(axis=1) * half_life / math.log(2)
    return bool((rows >= ENOUGH_ROWS * demand.rows.shape[1]).all())


def pack(demand: Demand) -> bytes:
    """For the other routers."""
    return np.stack([demand.rows, demand.reads, demand.uncertainty()]).astype("<f4").tobytes()


def total(layers: Sequence[int], experts: int, packed: Sequence[bytes]) -> Demand:
    """The sum over all routers; what does not fit this model is left out."""
    size = 3 * len(layers) * experts * 4
    sums: NDArray[np.float64] = np.zeros((3, len(layers), experts))
    for each in packed:
        if len(each) == size:
            sums += np.frombuffer(each, "<f4").reshape(sums.shape)
    return Demand(tuple(layers), *sums)
