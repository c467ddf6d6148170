"""What the engine reports of its cache adds up in the metrics."""

from __future__ import annotations

from gateway.messages import BreakerState, CacheStats, TierStats
from gateway.metrics import Metrics


def exposed(metrics: Metrics) -> set[str]:
    """The cache's samples, without the label that all have."""
    lines = metrics.exposition(None)[0].decode().splitlines()
    prefix = "consilium_cache_"
    mine = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    return {line.replace('model_name="tiny",', "").replace('{model_name="tiny"}', "") for line in mine}


def test_nothing_without_a_cache() -> None:
    assert exposed(Metrics("tiny")) == set()


def test_reports_add_up_and_the_last_state_counts() -> None:
    metrics = Metrics("tiny")
    states: list[BreakerState] = ["closed", "open"]
    for state in states:
        tiers = {"memory": TierStats(3, 4, 1, 0.25), "redis": TierStats(1, 3, 1, 0.5)}
        breakers: dict[str, BreakerState] = {"read": state, "write": "closed"}
        errors = {"read": {"timeout": 1, "something new": 2}}
        metrics.report(CacheStats(5, 60, 70, 8, tiers, 2, 1, errors, breakers))
    assert exposed(metrics) >= {
        'hits_total{tier="memory"} 6.0',
        'misses_total{tier="redis"} 6.0',
        'lookups_total{tier="redis"} 2.0',
        'lookup_seconds_total{tier="memory"} 0.5',
        "entries 5.0",
        "bytes 60.0",
        "capacity_bytes 70.0",
        "evictions_total 16.0",
        "written_rows_total 4.0",
        "dropped_rows_total 2.0",
        'errors_total{kind="timeout",operation="read"} 2.0',
        'errors_total{kind="something new",operation="read"} 4.0',
        'errors_total{kind="full",operation="write"} 0.0',
        'breaker{operation="read",state="open"} 1.0',
        'breaker{operation="read",state="closed"} 0.0',
        'breaker{operation="write",state="closed"} 1.0',
    }


def test_without_redis_there_is_nothing_about_it() -> None:
    metrics = Metrics("tiny")
    metrics.report(CacheStats(tiers={"memory": TierStats()}))
    assert not [line for line in exposed(metrics) if line.startswith(("breaker", "errors", "written", "dropped"))]
