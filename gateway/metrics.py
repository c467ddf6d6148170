"""What /metrics shows: the names that dashboards and autoscalers know from other servers, with our prefix."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from consilium import __version__
from gateway.messages import EngineStats, Status, WorkerStats

_PREFIX = "consilium_"
_TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_WORKER_COUNTERS = {
    "frames": ("worker_frames", "Frames sent, one per layer and step"),
    "rows": ("worker_rows", "Rows computed: (token, expert) pairs"),
    "failures": ("worker_failures", "Frames that failed or came too late"),
    "bytes_sent": ("worker_sent_bytes", "Bytes of the frames sent"),
    "bytes_received": ("worker_received_bytes", "Bytes of the replies"),
    "queue_seconds": ("worker_queue_seconds", "Time frames waited in the worker"),
    "compute_seconds": ("worker_compute_seconds", "Time the worker computed"),
    "wire_seconds": ("worker_wire_seconds", "Round trips less queue and compute time"),
}

# A series of creation times beside every counter and histogram would double what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client leaves this one without types


class Metrics:
    """Every metric of one gateway, in a registry of its own."""

    def __init__(self, model_name: str, engine_pid: int | None = None) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        ProcessCollector(registry=self.registry)
        if engine_pid is not None:
            ProcessCollector(namespace="consilium_engine", pid=lambda: engine_pid, registry=self.registry)
        self._gauge("build_info", "Always 1; the version is a label", "version").labels(model_name, __version__).set(1)
        self._requests()
        self._engine()
        self._workers()

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """The text of all metrics, and its content type as the scraper asked for it."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self.registry), content_type

    def answered(self, route: str, status: int) -> None:
        """An HTTP request got its answer; ``route`` is the route's pattern."""
        self._http_requests.labels(self._model, route, str(status)).inc()

    def choice_finished(self, reason: str) -> None:
        """One choice of a request ended well."""
        self._finished.labels(self._model, reason).inc()

    def step(self, stats: EngineStats) -> None:
        """A step of the engine is done."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_usage.set(stats.kv_tokens_used / max(1, stats.kv_tokens_total))
        self._preemptions.inc(stats.preemptions)
        computed = stats.prompt_tokens + stats.generated_tokens
        if computed:
            self.step_tokens.observe(computed)
            self.step_seconds.observe(stats.step_seconds)
        for worker in stats.workers:
            self._count_worker(worker)

    def status(self, status: Status) -> None:
        """The engine says anew which workers it reaches."""
        for worker in status.workers:
            self._count_worker(WorkerStats(worker.group, worker.address))  # series begin at 0
            self._worker_connected.labels(self._model, worker.group, worker.address).set(worker.connected)
            self._worker_experts.labels(self._model, worker.group, worker.address).set(worker.experts)

    def _requests(self) -> None:
        # Nothing that a client chooses freely becomes a label: every value is a series for ever.
        self._http_requests = self._counter("http_requests", "HTTP requests answered", "route", "status")
        self._finished = self._counter("request_success", "Choices that ended well", "finished_reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests").labels(self._model)
        self.generated = self._counter("generation_tokens", "Tokens generated for requests").labels(self._model)
        first = "From the request's arrival to its first token"
        self.first_token = self._histogram("time_to_first_token_seconds", first, _TIME_TO_FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens", _INTER_TOKEN)
        self.e2e = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end", _REQUEST)
        self.queue_time = self._histogram("request_queue_time_seconds", "Until the first step of a choice", _REQUEST)
        prefill = "From a choice's first step to its first token"
        self.prefill_time = self._histogram("request_prefill_time_seconds", prefill, _REQUEST)
        self.decode_time = self._histogram("request_decode_time_seconds", "From first to last token", _REQUEST)

    def _engine(self) -> None:
        self.running = self._gauge("num_requests_running", "Sequences in the engine's batch").labels(self._model)
        self.waiting = self._gauge("num_requests_waiting", "Sequences that wait for space").labels(self._model)
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1").labels(self._model)
        preemptions = self._counter("num_preemptions", "Sequences that gave up their space and are computed again")
        self._preemptions = preemptions.labels(self._model)
        # Others call it iteration_tokens_total, but promtool wants that ending for counters alone.
        self.step_tokens = self._histogram("iteration_tokens", "Tokens computed in one step", _STEP_TOKENS)
        self.step_seconds = self._histogram("iteration_seconds", "Duration of one step", _STEP)

    def _workers(self) -> None:
        self._worker_counters = {
            field: self._counter(name, text, "group", "worker") for field, (name, text) in _WORKER_COUNTERS.items()
        }
        self._worker_connected = self._gauge("worker_connected", "1 while the worker is reached", "group", "worker")
        self._worker_experts = self._gauge("worker_experts", "(layer, expert) pairs it holds", "group", "worker")

    def _count_worker(self, worker: WorkerStats) -> None:
        for field, counter in self._worker_counters.items():
            counter.labels(self._model, worker.group, worker.address).inc(getattr(worker, field))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(_PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(_PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry)
        return metric.labels(self._model)


class ChoiceClock:
    """Observes the times of one choice as its tokens arrive."""

    __slots__ = ("_arrival", "_first", "_last", "_metrics", "_queue_seconds")

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival  # on time.perf_counter's clock
        self._queue_seconds: float | None = None
        self._first: float | None = None
        self._last = arrival

    def queued(self, seconds: float) -> None:
        """The engine says how long the choice waited for its first step."""
        self._queue_seconds = seconds
        self._metrics.queue_time.observe(seconds)

    def token(self) -> None:
        """A token has arrived."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
            self._metrics.first_token.observe(now - self._arrival)
            if self._queue_seconds is not None:
                self._metrics.prefill_time.observe(max(0.0, now - self._arrival - self._queue_seconds))
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now
        self._metrics.generated.inc()

    def finished(self, reason: str) -> None:
        """The choice has ended well."""
        if self._first is not None:
            self._metrics.decode_time.observe(self._last - self._first)
        self._metrics.e2e.observe(time.perf_counter() - self._arrival)
        self._metrics.choice_finished(reason)
