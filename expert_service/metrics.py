"""What a worker says of itself on its own /metrics; the gateway's metrics say how it looks from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from consilium import __version__
from consilium.errors import ConfigError, ConsiliumError
from expert_service.call_queue import Job, Outcome
from expert_service.device import WorkerDevice
from expert_service.executor import Executor
from expert_service.expert_memory import ExpertMemory, LimitedMemory
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)

_PREFIX = "consilium_expert_service_"
_LABELS = ("model_name", "group")
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
# gRPC's names in small letters; others may come beside these.
_OUTCOMES = ("ok", "cancelled", "resource_exhausted", "deadline_exceeded", "unavailable", "internal")

# A series of creation times beside every counter and histogram would double what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client leaves this one without types


class ServiceMetrics:
    """Every metric of one worker, in a registry of its own."""

    def __init__(
        self,
        description: expert_pb2.DescribeResponse,
        executor: Executor,
        store: ExpertStore,
        memory: ExpertMemory,
        device: WorkerDevice | None = None,
    ) -> None:
        """Has ``executor`` tell it of every call that it took; ``device`` is told of where it is a GPU."""
        self.registry = CollectorRegistry()
        self._labels = (description.model, description.group)
        self._max_batch = description.max_batch
        ProcessCollector(registry=self.registry)
        self.registry.register(_ExecutorCollector(executor, self._labels))
        self.registry.register(_MemoryCollector(memory, self._labels))
        self._calls = Counter(
            _PREFIX + "calls", "Calls by what became of them", (*_LABELS, "outcome"), registry=self.registry
        )
        for outcome in _OUTCOMES:  # a ratio of errors needs series that begin at 0
            self._calls.labels(*self._labels, outcome)
        self._ok = self._calls.labels(*self._labels, "ok")
        self._rows = self._counter("rows", "Rows computed: (token, expert) pairs")
        self._batches = self._counter("compute_batches", "Compute batches: calls are cut at max_batch rows")
        self._received = self._counter("received_bytes", "Bytes of calls")
        self._sent = self._counter("sent_bytes", "Bytes of results")
        self._queue = self._histogram("queue_seconds", "From a call's arrival to the begin of its computing")
        self._compute = self._histogram("compute_seconds", "Computing of one call")
        self._inventory(description, store)
        if device is not None and device.name != "cpu":
            self.registry.register(_DeviceCollector(device, self._labels))
        executor.on_done = self.done

    def refused(self, error: Exception) -> None:
        """A call was not taken."""
        self._count(_outcome_of(error))

    def done(self, job: Job, outcome: Outcome) -> None:
        """A call that was taken is answered; called by the thread that computes."""
        self._received.inc(job.call.nbytes)
        if isinstance(outcome, Exception):
            self._count(_outcome_of(outcome))
        else:
            self._ok.inc()
            self._rows.inc(job.call.pairs)
            self._batches.inc(-(-job.call.pairs // self._max_batch))
            self._sent.inc(job.size - job.call.nbytes)
            self._queue.observe(outcome.queue_us / 1e6)
            self._compute.observe(outcome.compute_us / 1e6)

    def count_steps(self) -> Callable[[Exception | tuple[int, int]], None]:
        """What to tell, on any thread, of every whole step on the device: µs in the queue and µs of going on."""
        text, names = "Whole steps of gateways on this machine by what became of them", (*_LABELS, "outcome")
        steps = Counter(_PREFIX + "device_steps", text, names, registry=self.registry)
        text = "From a whole step's begin to its end; the gateway's half of each layer is part of it"
        seconds = self._histogram("device_step_seconds", text)

        def done(outcome: Exception | tuple[int, int]) -> None:
            steps.labels(*self._labels, _outcome_of(outcome) if isinstance(outcome, Exception) else "ok").inc()
            if not isinstance(outcome, Exception):
                seconds.observe(outcome[1] / 1e6)

        return done

    def serve(self, host: str, port: int) -> str:
        """Answer scrapes on a thread of its own. Returns the URL; raises ConfigError when the port cannot be had."""
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port} for metrics: {error.strerror}; choose another with "
                "--metrics-port (0 lets the system choose)"
            ) from None
        url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
        logger.info("metrics at %s", url)
        return url

    def _count(self, outcome: str) -> None:
        self._calls.labels(*self._labels, outcome).inc()

    def _inventory(self, description: expert_pb2.DescribeResponse, store: ExpertStore) -> None:
        info = {
            "version": __version__,
            "device": description.device,
            "quantization": description.quantization,
            "numerics_class": description.numerics_class,
            "model_fingerprint": description.model_fingerprint[:16],
        }
        names = (*_LABELS, *info)
        always = Gauge(_PREFIX + "info", "Always 1; the labels say what runs", names, registry=self.registry)
        always.labels(*self._labels, *info.values()).set(1)
        experts = self._gauge("experts", "(layer, expert) pairs held")
        experts.set_function(lambda: sum(len(each) for each in list(store.hashes.values())))
        self._gauge("weights_bytes", "Bytes of their weights, in memory or on disk").set_function(lambda: store.nbytes)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(_PREFIX + name, text, _LABELS, registry=self.registry).labels(*self._labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(_PREFIX + name, text, _LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, text: str) -> Histogram:
        metric = Histogram(_PREFIX + name, text, _LABELS, buckets=_SECONDS, registry=self.registry)
        return metric.labels(*self._labels)


class _ExecutorCollector(Collector):
    """Reads the executor at every scrape."""

    def __init__(self, executor: Executor, labels: tuple[str, str]) -> None:
        self._executor, self._labels = executor, labels

    def collect(self) -> Iterator[Metric]:
        text = "Time the compute thread was not idle; its rate is the busy fraction"
        busy = CounterMetricFamily(_PREFIX + "busy_seconds", text, labels=_LABELS)
        busy.add_metric(self._labels, self._executor.busy_seconds)
        yield busy
        waiting = GaugeMetricFamily(_PREFIX + "calls_in_flight", "Calls that wait or are computed", labels=_LABELS)
        waiting.add_metric(self._labels, self._executor.unfinished)
        yield waiting


class _DeviceCollector(Collector):
    """Reads the GPU at every scrape."""

    def __init__(self, device: WorkerDevice, labels: tuple[str, str]) -> None:
        self._device, self._labels = device, labels

    def collect(self) -> Iterator[Metric]:
        text = "Time the GPU was at calls, copies included; batches that overlap count each"
        busy = CounterMetricFamily(_PREFIX + "device_busy_seconds", text, labels=_LABELS)
        busy.add_metric(self._labels, self._device.busy_seconds)
        yield busy
        memory = self._device.memory()
        if memory is not None:
            for kind, text, size in (
                ("total", "Memory of the GPU", memory.total),
                ("free", "Memory of the GPU that nobody uses", memory.free),
            ):
                found = GaugeMetricFamily(f"{_PREFIX}device_memory_{kind}_bytes", text, labels=_LABELS)
                found.add_metric(self._labels, size)
                yield found


class _MemoryCollector(Collector):
    """Reads the memory of experts at every scrape."""

    def __init__(self, memory: ExpertMemory, labels: tuple[str, str]) -> None:
        self._memory, self._labels = memory, labels

    def collect(self) -> Iterator[Metric]:
        traffic = self._memory.traffic
        for name, text, value in (
            ("memory_hits", "Experts that a call found in memory", traffic.hits),
            ("memory_misses", "Experts that had to be read for a call", traffic.misses),
            ("memory_reads", "Experts read from disk", traffic.reads),
            ("memory_read_bytes", "Bytes of them", traffic.read_bytes),
            ("memory_failed_reads", "Experts that could not be read; their calls failed", traffic.failed_reads),
            ("memory_evictions", "Experts that made way for others", traffic.evictions),
        ):
            counter = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        if not isinstance(self._memory, LimitedMemory):
            return
        for name, text, value in (
            ("memory_experts", "Experts in memory", self._memory.resident),
            ("memory_bytes", "Memory of their matrices", self._memory.resident * self._memory.room),
            ("memory_limit_bytes", "The most that this may be", self._memory.slots * self._memory.room),
        ):
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge


def _outcome_of(error: BaseException) -> str:
    """The code that the caller is told."""
    kind = error if isinstance(error, ConsiliumError) else ConsiliumError
    return kind.grpc_code.lower()
