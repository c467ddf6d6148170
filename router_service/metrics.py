"""What a router says of itself on its own /metrics, read from what it knows at every scrape."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from consilium.errors import ConfigError
from router_service.controller import Controller
from router_service.holdings import pairs_of

logger = logging.getLogger(__name__)

_PREFIX = "consilium_router_"


def make_registry(controller: Controller, model: str) -> CollectorRegistry:
    """Every metric of one router, in a registry of its own."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Reader(controller, model))
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
    """Asks the controller, which may be at work on another thread: what it shows is replaced as a whole."""

    def __init__(self, controller: Controller, model: str) -> None:
        self._controller, self._model = controller, model

    def collect(self) -> Iterator[Metric]:
        known, placement = self._controller, self._controller.state.placement
        copies = sum(len(pairs_of(worker.experts)) for worker in placement.workers)
        yield self._gauge("leader", "1 where this router writes placements, 0 where another one does", known.leads)
        yield self._gauge("epoch", "Of the placement in force; it rises with every change", placement.epoch)
        yield self._gauge("gateways", "Gateways that were heard of", len(known.gateways))
        behind = sum(epoch < placement.epoch for epoch in known.gateways.values())
        yield self._gauge("gateways_behind", "Of those, how many still use an older placement", behind)
        yield self._gauge("copies", "(layer, expert) pairs that gateways may ask for, every copy counted", copies)
        yield self._gauge("missing_experts", "(layer, expert) pairs that nobody may be asked for", known.missing)
        yield self._gauge("balance", "Busiest worker over the mean in the worst layer; 0 without load", known.balance())
        yield self._workers()
        for name, text in (
            ("placements", "Placements planned"),
            ("loads", "Copies that workers were told to load"),
            ("drops", "Copies that workers were told to drop"),
            ("departures", "Workers that left, or whose lease ended"),
        ):
            family = CounterMetricFamily(_PREFIX + name, text, labels=("model_name",))
            family.add_metric((self._model,), known.counts[name])
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _workers(self) -> Metric:
        records = list(self._controller.records.values())
        leaving, broken = sum(each.draining for each in records), sum(bool(each.failed) for each in records)
        family = GaugeMetricFamily(_PREFIX + "workers", "Workers with a lease", labels=("model_name", "state"))
        states = {"leaving": leaving, "broken": broken, "all": len(records)}
        for state, count in states.items():
            family.add_metric((self._model, state), count)
        return family
