"""The names of all metrics that gateways and workers have, asked of the code that makes them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import SimpleNamespace
from typing import cast

from prometheus_client import CollectorRegistry

from expert_service.executor import Executor
from expert_service.expert_memory import AllInMemory
from expert_service.metrics import ServiceMetrics
from expert_service.store import ExpertStore
from gateway.metrics import Metrics
from protos.expert.v1 import expert_pb2
from protos.router.v1 import router_pb2
from router_service.controller import Controller
from router_service.metrics import make_registry

_IDLE_ROUTER = SimpleNamespace(
    state=router_pb2.RouterState(),
    leads=True,
    gateways={},
    missing=0,
    records={},
    counts=Counter(),
    balance=lambda: 0.0,
)


@cache
def metric_names() -> frozenset[str]:
    """Names of series: with `_total`, `_bucket` and the like."""
    idle = cast("Executor", SimpleNamespace(busy_seconds=0.0, unfinished=0))
    description = expert_pb2.DescribeResponse(model="m", group="g", max_batch=1)
    worker = ServiceMetrics(description, idle, ExpertStore([]), AllInMemory())
    router = make_registry(lambda: {"": cast("Controller", _IDLE_ROUTER)}, "m")
    return _names(Metrics("m").registry) | _names(worker.registry) | _names(router)


def _names(registry: CollectorRegistry) -> frozenset[str]:
    families = list(registry.collect())
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    samples = {sample.name for family in families for sample in family.samples}
    return frozenset(counters | samples | {family.name for family in families if family.type == "gauge"})
