"""The engine's side of expert load: counts the rows that workers are asked for, and says when to report them.

Letters: L layers, E experts in a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from consilium.model_config import ModelConfig
from gateway.batches import ExpertBatches
from gateway.messages import ExpertLoad

REPORT_INTERVAL = 1.0  # seconds between reports while there is traffic: a report holds up to L x E numbers


# By layer: rows of every expert, and steps in which it was asked for at all.
ExpertCounts = dict[int, tuple[list[int], list[int]]]


class Tally(Protocol):
    """What was counted elsewhere (consilium.gpu.tally)."""

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What is new [L, E]: rows, and steps that asked at all."""
        ...


class ExpertMeter:
    """Rows of every (layer, expert) since the last report, whoever computed them. Rows from a cache do not count."""

    def __init__(self, config: ModelConfig) -> None:
        self._rows = np.zeros((config.num_layers, config.num_experts), dtype=np.int64)  # [L, E]
        self._reads = np.zeros_like(self._rows)  # [L, E] steps that asked for it at all
        self.on_report: Callable[[ExpertCounts], None] = lambda _: None  # is told the same, with the reads
        self._tally: Tally | None = None  # where something has been counted since the last report
        self._counted = False
        self._next_report = 0.0  # on time.monotonic's clock

    def add(self, layer: int, batches: ExpertBatches) -> None:
        """Count the rows of one layer in one step."""
        self._rows[layer, batches.experts] += batches.counts
        self._reads[layer, batches.experts] += 1
        self._counted = True

    def add_later(self, tally: Tally) -> None:
        """A step's rows were counted there; they are fetched when the next report is due."""
        self._tally, self._counted = tally, True

    def due_in(self) -> float | None:
        """Seconds until there is something to report; None while there is nothing."""
        return max(0.0, self._next_report - time.monotonic()) if self._counted else None

    def take_report(self) -> ExpertLoad | None:
        """What was counted since the last report, if that is due."""
        if self.due_in() != 0.0:
            return None
        if self._tally is not None:
            rows, reads = self._tally.take()
            self._rows += rows
            self._reads += reads
            self._tally = None
        report = ExpertLoad({layer: rows.tolist() for layer, rows in enumerate(self._rows) if rows.any()})
        self.on_report({layer: (rows, self._reads[layer].tolist()) for layer, rows in report.rows.items()})
        self._rows.fill(0)
        self._reads.fill(0)
        self._counted = False
        self._next_report = time.monotonic() + REPORT_INTERVAL
        return report
