"""The metrics of each worker as the gateway sees it, by expert group and address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.messages import EXPERT_CALL_ROWS, WorkerStats, WorkerStatus

_PREFIX = "consilium_worker_"
_LABELS = ("model_name", "group", "worker")
_COUNTERS = {
    "frames": ("frames", "Frames answered, one per layer and step"),
    "rows": ("rows", "Rows computed: (token, expert) pairs"),
    "failures": ("failures", "Frames that failed or came too late"),
    "failovers": ("failovers", "Frames it got because another worker had failed"),
    "hedges": ("hedges", "Frames it got because another worker was late"),
    "late": ("late", "Frames that another worker answered before it did"),
    "audits": ("audits", "Frames it computed only to be compared"),
    "lies": ("lies", "Frames that an audit found wrong"),
    "ejections": ("ejections", "Times it was left alone because it kept failing"),
    "bytes_sent": ("sent_bytes", "Bytes of the frames sent"),
    "bytes_received": ("received_bytes", "Bytes of the replies"),
    "queue_seconds": ("queue_seconds", "Time frames waited in the worker"),
    "compute_seconds": ("compute_seconds", "Time the worker computed"),
    "wire_seconds": ("wire_seconds", "Round trips less queue and compute time"),
}
_BOUNDS = [*(f"{bound:.1f}" for bound in EXPERT_CALL_ROWS), "+Inf"]


@dataclass(slots=True)
class _Worker:
    status: WorkerStatus
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_COUNTERS, 0.0))
    expert_calls: list[int] = field(default_factory=lambda: [0] * len(_BOUNDS))


class WorkerMetrics(Collector):
    """Sums of the engine's statistics. A worker that the endpoints no longer name has no series any more."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._workers: dict[tuple[str, str], _Worker] = {}

    def follow(self, statuses: Iterable[WorkerStatus]) -> None:
        """The workers there are now; new ones begin at 0."""
        before, self._workers = self._workers, {}
        for status in statuses:
            known = before.get((status.group, status.address)) or _Worker(status)
            known.status = status
            self._workers[status.group, status.address] = known

    def count(self, stats: Iterable[WorkerStats]) -> None:
        """Add what workers did."""
        for each in stats:
            worker = self._workers.get((each.group, each.address))
            if worker is None:  # its last frames, after its address was withdrawn
                continue
            for name in _COUNTERS:
                worker.counts[name] += getattr(each, name)
            if each.expert_calls:
                worker.expert_calls = [a + b for a, b in zip(worker.expert_calls, each.expert_calls, strict=True)]

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        for field_name, (name, text) in _COUNTERS.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
            for labels, worker in self._labelled():
                counter.add_metric(labels, worker.counts[field_name])
            yield counter
        connected = GaugeMetricFamily(_PREFIX + "connected", "1 while the worker is reached", labels=_LABELS)
        experts = GaugeMetricFamily(_PREFIX + "experts", "(layer, expert) pairs it holds", labels=_LABELS)
        local = GaugeMetricFamily(_PREFIX + "local", "1 while frames go over a local link", labels=_LABELS)
        ejected = GaugeMetricFamily(_PREFIX + "ejected", "1 while it is left alone for its failures", labels=_LABELS)
        calls = HistogramMetricFamily(_PREFIX + "expert_call_rows", "Rows of one expert in one frame", labels=_LABELS)
        for labels, worker in self._labelled():
            connected.add_metric(labels, worker.status.connected)
            experts.add_metric(labels, worker.status.experts)
            ejected.add_metric(labels, worker.status.ejected)
            local.add_metric(labels, worker.status.transport == "local")
            buckets = list(zip(_BOUNDS, accumulate(worker.expert_calls), strict=True))
            calls.add_metric(labels, buckets, worker.counts["rows"])
        yield from (connected, experts, local, ejected, calls)

    def _labelled(self) -> Iterator[tuple[tuple[str, str, str], _Worker]]:
        for (group, address), worker in self._workers.items():
            yield (self._model, group, address), worker
