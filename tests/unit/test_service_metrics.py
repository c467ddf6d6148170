"""What a worker counts of its own calls, whatever becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from consilium.errors import ExpertUnavailable, Overloaded
from expert_service.executor import Executor
from expert_service.expert_memory import AllInMemory
from expert_service.frame_computer import FrameComputer
from expert_service.metrics import ServiceMetrics
from expert_service.servicer import ExpertServicer
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2
from tests.unit.test_executor import Gate, make_call, make_computer

MAX_BATCH = 4
DESCRIPTION = expert_pb2.DescribeResponse(
    model="m", group="g", device="cpu", quantization="none", numerics_class="c", max_batch=MAX_BATCH
)


def run(computer: FrameComputer, body: Callable[[Executor, ServiceMetrics, ExpertServicer], Awaitable[None]]) -> None:
    async def main() -> None:
        executor = Executor(computer, 2, 2**20)
        store = ExpertStore([0, 1])
        store.hashes[1].update({3: b"x", 5: b"y"})
        store.nbytes = 1000
        metrics = ServiceMetrics(DESCRIPTION, executor, store, AllInMemory())
        try:
            await asyncio.wait_for(
                body(executor, metrics, ExpertServicer(DESCRIPTION, executor, metrics, 1, store)), 30
            )
        finally:
            if isinstance(computer, Gate):
                computer.opened.set()
            assert executor.close(30)

    asyncio.run(main())


def samples(metrics: ServiceMetrics) -> dict[str, float]:
    """By name without our prefix, and the outcome where there is one."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("consilium_expert_service_")
            found[" ".join(filter(None, [name, sample.labels.get("outcome")]))] = sample.value
            if name != sample.name:
                assert (sample.labels["model_name"], sample.labels["group"]) == ("m", "g")
    return found


def test_calls_that_are_computed() -> None:
    call = make_call(rows=5)  # 10 pairs, so 3 batches

    async def body(_: Executor, metrics: ServiceMetrics, servicer: ExpertServicer) -> None:
        before = samples(metrics)
        assert (before["calls_total ok"], before["busy_seconds_total"]) == (0, 0)
        for _number in range(2):
            result = await servicer.submit(call)
        await servicer.drain()  # until the last one is counted, too
        found = samples(metrics)
        assert found["calls_total ok"] == 2
        assert found["rows_total"] == 20
        assert found["compute_batches_total"] == 6
        assert found["received_bytes_total"] == 2 * call.ByteSize()
        assert found["sent_bytes_total"] == 2 * result.rows.nbytes
        assert found["queue_seconds_count"] == found["compute_seconds_count"] == 2
        assert 0 < found["compute_seconds_sum"] <= found["busy_seconds_total"]
        assert found["calls_in_flight"] == 0

    run(make_computer(MAX_BATCH), body)


def test_calls_that_are_given_up_fail_or_are_not_taken() -> None:
    gate = Gate()
    gate.failure = RuntimeError("a bug")

    async def body(_: Executor, metrics: ServiceMetrics, servicer: ExpertServicer) -> None:
        failing, given_up = servicer.submit(make_call()), servicer.submit(make_call())
        with pytest.raises(Overloaded):
            servicer.submit(make_call())
        assert samples(metrics)["calls_in_flight"] == 2
        given_up.cancel()
        await asyncio.sleep(0)  # the callback that tells the job
        gate.opened.set()
        await asyncio.wait([failing])
        await servicer.drain()
        with pytest.raises(ExpertUnavailable):
            servicer.submit(make_call())
        found = samples(metrics)
        outcomes = {name.split()[1]: value for name, value in found.items() if name.startswith("calls_total")}
        assert {name: value for name, value in outcomes.items() if value} == {
            "internal": 1,
            "cancelled": 1,
            "resource_exhausted": 1,
            "unavailable": 1,
        }
        assert found["rows_total"] == found["compute_seconds_count"] == 0
        assert found["busy_seconds_total"] > 0

    run(gate, body)


def test_what_it_holds_and_what_it_is() -> None:
    async def body(_: Executor, metrics: ServiceMetrics, __: ExpertServicer) -> None:
        found = samples(metrics)
        assert (found["experts"], found["weights_bytes"], found["info"]) == (2, 1000, 1)
        assert 'numerics_class="c"' in generate_latest(metrics.registry).decode()

    run(make_computer(), body)
