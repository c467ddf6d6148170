"""What /metrics shows: the names that dashboards and autoscalers know from other servers, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from consilium import __version__
from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable, NotReady, Overloaded
from gateway.cache_metrics import CacheMetrics
from gateway.expert_load import ExpertLoadTable
from gateway.messages import EngineStats, ExpertLoad, Report, Status
from gateway.stage_clock import STAGES
from gateway.worker_metrics import WorkerMetrics

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
# A series of creation times beside every counter and histogram would double what is scraped.
disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus-client leaves this one without types


class Metrics:
    """Every metric of one gateway, in a registry of its own."""

    def __init__(self, model_name: str, engine_pid: int | None = None, *, all_experts: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        ProcessCollector(registry=self.registry)
        if engine_pid is not None:
            ProcessCollector(namespace="consilium_engine", pid=lambda: engine_pid, registry=self.registry)
        self._gauge("build_info", "Always 1; the version is a label", "version").labels(model_name, __version__).set(1)
        self._requests()
        self._engine()
        self._workers = WorkerMetrics(model_name)
        self.registry.register(self._workers)
        self.experts = ExpertLoadTable(model_name, show_all=all_experts)
        self.registry.register(self.experts)
        self._cache = CacheMetrics(model_name)
        self.registry.register(self._cache)

    def exposition(self, accept: str | None) -> tuple[bytes, str]:
        """The text of all metrics, and its content type as the scraper asked for it."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self.registry), content_type

    def answered(self, route: str, status: int) -> None:
        """An HTTP request got its answer; ``route`` is the route's pattern."""
        self._http_requests.labels(self._model, route, str(status)).inc()

    def watch_ready(self, is_ready: Callable[[], bool]) -> None:
        """Ask ``is_ready`` at every scrape."""
        self._ready.set_function(is_ready)

    def request_failed(self, error: Exception) -> None:
        """A request that was to be computed ended with an error, perhaps in the middle of a stream."""
        kind = type(error) if isinstance(error, ConsiliumError) else ConsiliumError
        self._failed.labels(self._model, kind.__name__).inc()

    def choice_finished(self, reason: str) -> None:
        """One choice of a request ended well."""
        self._finished.labels(self._model, reason).inc()

    def step(self, stats: EngineStats) -> None:
        """A step of the engine is done."""
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.kv_usage.set(stats.kv_tokens_used / max(1, stats.kv_tokens_total))
        self._preemptions.inc(stats.preemptions)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        self._prefix_evicted.inc(stats.prefix_evicted)
        self.prefix_tokens.set(stats.prefix_tokens)
        computed = stats.prompt_tokens + stats.generated_tokens
        if computed:
            self.step_tokens.observe(computed)
            self.step_seconds.observe(stats.step_seconds)
            self.micro_batches.set(stats.micro_batches)
            self.hop_seconds.set(stats.hop_seconds)
            self.rereading_seconds.set(stats.rereading_seconds)
        for policy, rows in stats.last_replica.items():
            self._last_replica.labels(self._model, policy).inc(rows)
        for stage, seconds in stats.stages.items():
            self._stages[stage].inc(max(0.0, seconds))
        for change, pairs in stats.gate_policy.items():
            self._gate_policy.labels(self._model, change).inc(pairs)
        self._workers.count(stats.workers)

    def status(self, status: Status) -> None:
        """The engine says anew which workers it reaches."""
        self._workers.follow(status.workers)
        self.missing_experts.set(status.missing_experts)

    def report(self, report: Report) -> None:
        """The engine says which experts got how many rows, or what its cache did."""
        if isinstance(report, ExpertLoad):
            self.experts.add(report.rows)
        else:
            self._cache.add(report)

    def _requests(self) -> None:
        # Nothing that a client chooses freely becomes a label: every value is a series for ever.
        self._http_requests = self._counter("http_requests", "HTTP requests answered", "route", "status")
        self._finished = self._counter("request_success", "Choices that ended well", "finished_reason")
        for reason in ("stop", "length"):  # ratios need series that begin at 0
            self._finished.labels(self._model, reason)
        self._failed = self._counter("request_failure", "Requests that ended with an error, streams too", "error")
        for kind in (ExpertUnavailable, DeadlineExceeded, NotReady, Overloaded, ConsiliumError):
            self._failed.labels(self._model, kind.__name__)
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
        self._ready = self._gauge("ready", "1 while requests are taken, as /ready says").labels(self._model)
        self.missing_experts = self._gauge("missing_experts", "(layer, expert) pairs that no worker holds").labels(
            self._model
        )
        self.running = self._gauge("num_requests_running", "Sequences in the engine's batch").labels(self._model)
        self.waiting = self._gauge("num_requests_waiting", "Sequences that wait for space").labels(self._model)
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1").labels(self._model)
        self._gate_policy = self._counter(
            "gate_policy_pairs", "Choices of the gate dropped, moved, or left over capacity by policy", "change"
        )
        preemptions = self._counter("num_preemptions", "Sequences that gave up their space for others")
        self._preemptions = preemptions.labels(self._model)
        self._prefix_cache()
        # Others call it iteration_tokens_total, but promtool wants that ending for counters alone.
        self.step_tokens = self._histogram("iteration_tokens", "Tokens computed in one step", _STEP_TOKENS)
        self.step_seconds = self._histogram("iteration_seconds", "Duration of one step", _STEP)
        text = "Rows (of every layer) that needed an expert that no worker held, by what was done instead"
        self._last_replica = self._counter("last_replica_rows", text, "policy")
        self._overlap()
        stages = self._counter("engine_stage_seconds", "Time of the engine's thread by stage of a step", "stage")
        self._stages = {stage: stages.labels(self._model, stage) for stage in STAGES}

    def _overlap(self) -> None:
        count = self._gauge("micro_batches", "Batches that the last step was computed as")
        self.micro_batches = count.labels(self._model)
        hop = self._gauge("layer_hop_seconds", "The way to a layer's experts and back, which a second batch can hide")
        self.hop_seconds = hop.labels(self._model)
        rereading = self._gauge("layer_rereading_seconds", "What two batches cost a layer by reading weights twice")
        self.rereading_seconds = rereading.labels(self._model)

    def _prefix_cache(self) -> None:
        queries = self._counter("prefix_cache_queries", "Prompt tokens looked for in the prefix cache")
        self._prefix_queries = queries.labels(self._model)
        hits = self._counter("prefix_cache_hits", "Prompt tokens found there, and not computed")
        self._prefix_hits = hits.labels(self._model)
        evicted = self._counter("prefix_cache_evicted_tokens", "Tokens that made room for others")
        self._prefix_evicted = evicted.labels(self._model)
        kept = self._gauge("prefix_cache_tokens", "Tokens kept of sequences that have ended; they count as free")
        self.prefix_tokens = kept.labels(self._model)

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
