"""Load of experts and workers as /metrics shows it: bounded, never falling, without workers that are gone."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric

from gateway.expert_load import SHOWN, ExpertLoadTable
from gateway.messages import EXPERT_CALL_ROWS, WorkerStats, WorkerStatus
from gateway.worker_metrics import WorkerMetrics

LAYERS, EXPERTS = 5, 8
OTHER = ("other", "other")
REPORTS = st.lists(
    st.dictionaries(
        st.integers(0, LAYERS - 1), st.lists(st.integers(0, 50), min_size=EXPERTS, max_size=EXPERTS), max_size=LAYERS
    ),
    min_size=1,
    max_size=12,
)


def shown(table: ExpertLoadTable) -> dict[tuple[str, str], float]:
    (family,) = table.collect()
    return {(sample.labels["layer"], sample.labels["expert"]): sample.value for sample in family.samples}


def rows_of(reports: list[dict[int, list[int]]]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for layer, rows in report.items():
            found.update({(str(layer), str(expert)): count for expert, count in enumerate(rows)})
    return found


@given(REPORTS)
def test_few_series_that_never_fall(reports: list[dict[int, list[int]]]) -> None:
    """Also when others become the busiest; and each report adds as many rows as it has."""
    table = ExpertLoadTable("m")
    last: dict[tuple[str, str], float] = {}
    for report in reports:
        table.add(report)
        now = shown(table)
        assert len(now) <= SHOWN + 1
        assert all(now[expert] >= value for expert, value in last.items() if expert in now)
        grown = sum(value - last.get(expert, 0) for expert, value in now.items())
        assert grown == sum(map(sum, report.values()))
        last |= now


@given(REPORTS)
def test_the_busiest_are_shown(reports: list[dict[int, list[int]]]) -> None:
    table = ExpertLoadTable("m")
    for report in reports:
        table.add(report)
    rows = rows_of(reports)
    named = set(shown(table)) - {OTHER}
    hidden = set(rows) - named
    assert min((rows[expert] for expert in named), default=0) >= max((rows[expert] for expert in hidden), default=0)
    assert len(named) == min(SHOWN, len(rows))


@given(REPORTS)
def test_all_when_asked_for(reports: list[dict[int, list[int]]]) -> None:
    table = ExpertLoadTable("m", show_all=True)
    for report in reports:
        table.add(report)
    assert shown(table) == rows_of(reports)


def samples(metrics: WorkerMetrics) -> dict[tuple[str, ...], float]:
    families: list[Metric] = list(metrics.collect())
    return {
        (
            sample.name.removeprefix("consilium_worker_"),
            sample.labels["worker"],
            sample.labels.get("le", ""),
        ): sample.value
        for family in families
        for sample in family.samples
    }


def test_sums_by_worker() -> None:
    metrics = WorkerMetrics("m")
    near = WorkerStatus("g", "a:1", True, experts=8, transport="local")
    metrics.follow([near, WorkerStatus("g", "b:1", False, "connecting")])
    assert samples(metrics)["frames_total", "b:1", ""] == 0  # a series begins at 0
    calls = [0] * (len(EXPERT_CALL_ROWS) + 1)
    calls[0], calls[2], calls[-1] = 3, 1, 2
    for _ in range(2):
        metrics.count([WorkerStats("g", "a:1", frames=1, rows=5, failovers=1, wire_seconds=0.5, expert_calls=calls)])
    metrics.count([WorkerStats("g", "a:1", failures=1)])
    found = samples(metrics)
    assert found["frames_total", "a:1", ""] == 2
    assert found["failovers_total", "a:1", ""] == 2
    assert found["failures_total", "a:1", ""] == 1
    assert found["wire_seconds_total", "a:1", ""] == 1.0
    assert (found["connected", "a:1", ""], found["connected", "b:1", ""]) == (1, 0)
    assert (found["local", "a:1", ""], found["local", "b:1", ""]) == (1, 0)
    assert (found["experts", "a:1", ""], found["experts", "b:1", ""]) == (8, 0)
    bounds = [found["expert_call_rows_bucket", "a:1", le] for le in ("1.0", "2.0", "4.0", "4096.0", "+Inf")]
    assert bounds == [6, 6, 8, 8, 12]
    assert found["expert_call_rows_count", "a:1", ""] == 12
    assert found["expert_call_rows_sum", "a:1", ""] == 10


def test_nothing_is_left_of_a_worker_that_is_gone() -> None:
    metrics = WorkerMetrics("m")
    both = [WorkerStatus("g", "a:1", True), WorkerStatus("g", "b:1", True)]
    metrics.follow(both)
    metrics.count([WorkerStats("g", "a:1", frames=4), WorkerStats("g", "b:1", frames=4)])
    metrics.follow(both[:1])
    metrics.count([WorkerStats("g", "b:1", frames=1)])  # its last answers
    assert {worker for _, worker, _ in samples(metrics)} == {"a:1"}
    assert samples(metrics)["frames_total", "a:1", ""] == 4
    metrics.follow(both)
    assert samples(metrics)["frames_total", "b:1", ""] == 0
