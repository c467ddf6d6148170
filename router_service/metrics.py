"""What a router says of itself on its own /metrics, read from what it knows at every scrape."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from consilium.errors import ConfigError
from router_service.controller import Controller
from router_service.holdings import pairs_of

logger = logging.getLogger(__name__)

_PREFIX = "consilium_router_"
_LABELS = ("model_name", "weight_version")


def make_registry(controllers: Callable[[], Mapping[str, Controller]], model: str) -> CollectorRegistry:
    """Every metric of one router, in a registry of its own; ``controllers`` are by version of the weights."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Reader(controllers, model))
    return registry


def serve(registry: CollectorRegistry, host: str, port: int) -> str:
    """Answer scrapes on a thread of its own. Returns the URL; raises ConfigError when the port cannot be had."""
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} for metrics: {error.strerror}; choose another with --metrics-port "
            "(0 lets the system choose)"
        ) from None
    url = f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    logger.info("metrics at %s", url)
    return url


class _Reader(Collector):
    """Asks the controllers, which may be at work on another thread: what they show is replaced as a whole."""

    def __init__(self, controllers: Callable[[], Mapping[str, Controller]], model: str) -> None:
        self._controllers, self._model = controllers, model

    def collect(self) -> Iterator[Metric]:
        known = self._controllers()
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
            for version, controller in known.items():
                gauge.add_metric((self._model, version), value(controller))
            yield gauge
        workers = GaugeMetricFamily(_PREFIX + "workers", "Workers with a lease", labels=(*_LABELS, "state"))
        for version, controller in known.items():
            for state, count in _states(controller).items():
                workers.add_metric((self._model, version, state), count)
        yield workers
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
            for version, controller in known.items():
                counter.add_metric((self._model, version), controller.counts[name])
            yield counter


_GAUGES: dict[str, tuple[str, Callable[[Controller], float]]] = {
    "leader": ("1 where this router writes placements, 0 where another one does", lambda each: each.leads),
    "epoch": ("Of the placement in force; it rises with every change", lambda each: each.state.placement.epoch),
    "gateways": ("Gateways that were heard of", lambda each: len(each.gateways)),
    "gateways_behind": (
        "Of those, how many still use an older placement",
        lambda each: sum(epoch < each.state.placement.epoch for epoch in each.gateways.values()),
    ),
    "copies": (
        "(layer, expert) pairs that gateways may ask for, every copy counted",
        lambda each: sum(len(pairs_of(worker.experts)) for worker in each.state.placement.workers),
    ),
    "missing_experts": ("(layer, expert) pairs that nobody may be asked for", lambda each: each.missing),
    "balance": ("Busiest worker over the mean in the worst layer; 0 without load", lambda each: each.balance()),
}
_COUNTERS = {
    "placements": "Placements planned",
    "loads": "Copies that workers were told to load",
    "drops": "Copies that workers were told to drop",
    "departures": "Workers that left, or whose lease ended",
}


def _states(controller: Controller) -> dict[str, int]:
    records = list(controller.records.values())
    leaving, broken = sum(each.draining for each in records), sum(bool(each.failed) for each in records)
    return {"all": len(records), "leaving": leaving, "broken": broken}
