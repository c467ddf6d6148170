"""How many rows went to each expert: the whole matrix for /load/experts, the busiest ones for /metrics."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

SHOWN = 20  # series by default: some models have ten thousand experts
_OTHER = "other"
_NAME = "consilium_expert_rows"
_TEXT = "Rows that went to an expert: of the busiest experts, and of the rest together as `other`"

Expert = tuple[int, int]  # layer and expert


class ExpertLoadTable(Collector):
    """Sums of the engine's reports.

    The shown experts are those with most rows since the start, and change now and then. So that no series ever falls,
    each row is counted once, when it is reported: for its expert if that is shown at the moment, else for `other`.
    Rates are therefore right, and so is the sum over all series; the whole count of an expert is in :attr:`rows`.
    """

    def __init__(self, model_name: str, *, show_all: bool = False) -> None:
        self.rows: dict[int, list[int]] = {}  # of every expert since the start, by layer
        self._model = model_name
        self._shown_count = None if show_all else SHOWN
        self._shown: list[Expert] = []
        self._counted: dict[Expert, int] = {}  # only what was reported while it was shown
        self._other = 0

    def add(self, report: Mapping[int, list[int]]) -> None:
        """Count the rows of one report: of all the experts of a layer, by layer."""
        for layer, rows in report.items():
            known = self.rows.setdefault(layer, [0] * len(rows))
            for expert, count in enumerate(rows):
                known[expert] += count
        self._shown = self._busiest()
        total = sum(sum(rows) for rows in report.values())
        for layer, expert in self._shown:
            count = report[layer][expert] if layer in report else 0
            self._counted[layer, expert] = self._counted.get((layer, expert), 0) + count
            total -= count
        self._other += total

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = CounterMetricFamily(_NAME, _TEXT, labels=("model_name", "layer", "expert"))
        for layer, expert in self._shown:
            family.add_metric((self._model, str(layer), str(expert)), self._counted[layer, expert])
        if self._shown_count is not None:
            family.add_metric((self._model, _OTHER, _OTHER), self._other)
        yield family

    def _busiest(self) -> list[Expert]:
        every = [(-count, layer, expert) for layer, rows in self.rows.items() for expert, count in enumerate(rows)]
        chosen = sorted(every) if self._shown_count is None else heapq.nsmallest(self._shown_count, every)
        return [(layer, expert) for _, layer, expert in chosen]
