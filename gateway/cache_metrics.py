"""The metrics of the expert-output cache; there are none where it is not configured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.messages import BreakerState, CacheStats, TierStats

_PREFIX = "consilium_cache_"
# Kinds of errors that are there from the start, so that a rate over them has something to begin with.
_KINDS = {"read": ("timeout", "connection", "refused", "value"), "write": ("timeout", "connection", "refused", "full")}


class CacheMetrics(Collector):
    """Sums of the engine's reports, and the state that the last one told."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._last: CacheStats | None = None
        self._tiers: dict[str, TierStats] = {}
        self._errors: dict[tuple[str, str], int] = {}
        self._written = self._dropped = self._evictions = 0

    def add(self, stats: CacheStats) -> None:
        """Count one report."""
        self._last = stats
        for name, tier in stats.tiers.items():
            known = self._tiers.setdefault(name, TierStats())
            known.hits += tier.hits
            known.misses += tier.misses
            known.lookups += tier.lookups
            known.seconds += tier.seconds
        for operation in stats.breakers:
            for kind in _KINDS[operation]:
                self._errors.setdefault((operation, kind), 0)
        for operation, kinds in stats.errors.items():
            for kind, count in kinds.items():
                self._errors[operation, kind] = self._errors.get((operation, kind), 0) + count
        self._written += stats.written
        self._dropped += stats.dropped
        self._evictions += stats.evictions

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        if self._last is None:
            return
        yield self._by_tier("hits", "Rows found: tokens at a layer, each with the outputs of all its experts")
        yield self._by_tier("misses", "Rows not found, or not asked for as the breaker was open")
        yield self._by_tier("lookups", "Lookups, one for a layer and step")
        yield self._by_tier("seconds", "Time that the engine spent on lookups", "lookup_seconds")
        yield self._gauge("entries", "Rows in memory", self._last.entries)
        yield self._gauge("bytes", "Bytes of the rows in memory", self._last.bytes)
        yield self._gauge("capacity_bytes", "Most bytes of rows in memory", self._last.capacity)
        yield self._counter("evictions", "Rows that gave up their place in memory", self._evictions)
        if self._last.breakers:
            yield self._counter("written_rows", "Rows written to Redis", self._written)
            yield self._counter("dropped_rows", "Rows not written: breaker open, or too many waiting", self._dropped)
            yield self._error_counter()
            yield self._breaker_states(self._last)

    def _by_tier(self, field: str, text: str, name: str = "") -> Metric:
        family = CounterMetricFamily(_PREFIX + (name or field), text, labels=("model_name", "tier"))
        for tier, stats in self._tiers.items():
            family.add_metric((self._model, tier), getattr(stats, field))
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _error_counter(self) -> Metric:
        text = (
            "Failures by operation and kind: no answer in time, no connection, an error reply, a value that is no row"
        )
        family = CounterMetricFamily(_PREFIX + "errors", text, labels=("model_name", "operation", "kind"))
        for (operation, kind), count in self._errors.items():
            family.add_metric((self._model, operation, kind), count)
        return family

    def _breaker_states(self, stats: CacheStats) -> Metric:
        labels = ("model_name", "operation", "state")
        family = GaugeMetricFamily(_PREFIX + "breaker", "1 for the state the breaker is in", labels=labels)
        for operation, current in stats.breakers.items():
            for state in get_args(BreakerState):
                family.add_metric((self._model, operation, state), float(state == current))
        return family
