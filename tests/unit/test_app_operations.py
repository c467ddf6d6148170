"""The whole HTTP app over a fake engine: what operators see."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from consilium import __version__
from gateway.messages import ExpertLoad, Failure, Status
from tests.fake_engine import CONTEXT, FakeStack, fake_stack

pytestmark = pytest.mark.anyio

WORD = "swordfish"


@pytest.fixture
async def stack(tokenizer_folder: Path) -> AsyncIterator[FakeStack]:
    async with fake_stack(tokenizer_folder) as stack:
        yield stack


async def samples(stack: FakeStack) -> dict[tuple[str, str], float]:
    """Values of all metrics, by name and by whatever label tells its series apart."""
    response = await stack.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            found[sample.name.removeprefix("consilium_"), ",".join(labels.values())] = sample.value
    return found


async def test_models_version_load(stack: FakeStack) -> None:
    models = (await stack.client.get("/v1/models")).json()
    (card,) = models["data"]
    assert (models["object"], card["id"], card["max_model_len"]) == ("list", "tiny", CONTEXT)
    assert (await stack.client.get("/v1/models/tiny")).json() == card
    assert (await stack.client.get("/version")).json() == {"version": __version__}
    load = (await stack.client.get("/load")).json()
    assert (load["open_sequences"], load["capacity"], load["kv_tokens_total"]) == (0, 64, 100_000)
    assert load["workers"][0]["connected"] is True
    assert load["workers"][0]["transport"] == "grpc"


async def test_health_and_readiness(stack: FakeStack) -> None:
    assert (await stack.client.get("/health")).json() == {"status": "ok"}
    assert (await stack.client.get("/ready")).json() == {"status": "ready", "model": "tiny"}


async def test_metrics_of_requests(stack: FakeStack) -> None:
    body = {"prompt": "Hello", "max_tokens": 5, "n": 2}
    await stack.client.post("/v1/completions", json=body)
    await stack.client.post("/v1/completions", json={**body, "stop": "c", "stream": True})
    await stack.client.post("/v1/completions", json={**body, "n": 99})
    found = await samples(stack)
    assert found["http_requests_total", "/v1/completions,200"] == 2
    assert found["http_requests_total", "/v1/completions,400"] == 1
    assert found["prompt_tokens_total", ""] == 6  # 3 of each request, whatever n
    assert found["generation_tokens_total", ""] == 10 + 5
    assert found["request_success_total", "length"] == 2
    assert found["request_success_total", "stop"] == 2
    assert found["time_to_first_token_seconds_count", ""] == 4
    assert found["inter_token_latency_seconds_count", ""] == 11
    assert found["e2e_request_latency_seconds_count", ""] == 4
    assert found["request_queue_time_seconds_sum", ""] == 4 * 0.5
    assert found["request_prefill_time_seconds_count", ""] == 4
    assert found["request_decode_time_seconds_count", ""] == 4


async def test_metrics_of_the_engine_and_its_workers(stack: FakeStack) -> None:
    await stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5})
    worker = "experts,127.0.0.1:50051"
    found = await samples(stack)
    assert found["iteration_tokens_count", ""] == 5
    assert found["iteration_tokens_sum", ""] == 5
    assert found["num_requests_running", ""] == 0
    assert found["kv_cache_usage_perc", ""] == 7 / 100_000
    assert found["prefix_cache_queries_total", ""] == 5 * 40
    assert found["prefix_cache_hits_total", ""] == 5 * 30
    assert found["prefix_cache_evicted_tokens_total", ""] == 5 * 20
    assert found["prefix_cache_tokens", ""] == 10
    assert found["engine_stage_seconds_total", "compute"] == pytest.approx(5 * 0.006)
    assert found["engine_stage_seconds_total", "sample"] == 0
    assert found["worker_frames_total", worker] == 5
    assert found["worker_rows_total", worker] == 5
    assert found["worker_sent_bytes_total", worker] == 500
    assert found["worker_connected", worker] == 1
    assert found["worker_experts", worker] == 12


async def test_failures_are_counted_in_streams_too(stack: FakeStack) -> None:
    stack.engine.failure = Failure("ExpertUnavailable", "gone")
    response = await stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5, "stream": True})
    assert response.status_code == 200  # the first token had been sent
    await stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5})
    await stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": -1})  # never begins
    found = await samples(stack)
    assert found["request_failure_total", "ExpertUnavailable"] == 2
    assert sum(value for (name, _), value in found.items() if name == "request_failure_total") == 2


async def test_readiness_and_missing_experts(stack: FakeStack) -> None:
    assert (await samples(stack))["ready", ""] == 1
    stack.engine.pause()
    request = asyncio.create_task(stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5}))
    await stack.engine.started.wait()
    stack.engine.send(Status(False, "no worker holds experts 1 of layers 0", [], 100_000, missing_experts=7))
    stack.engine.resume()
    await request  # whose answers come after the status
    found = await samples(stack)
    assert found["ready", ""] == 0
    assert found["missing_experts", ""] == 7
    assert not [labels for name, labels in found if name.startswith("worker_")]  # the one there was is gone


async def test_load_of_every_expert(stack: FakeStack) -> None:
    assert (await stack.client.get("/load/experts")).json() == {"layers": []}
    stack.engine.send(ExpertLoad({3: [0, 5], 1: [2, 0]}))
    stack.engine.send(ExpertLoad({3: [1, 1]}))
    await stack.client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 5})  # answered after them
    found = await samples(stack)
    assert found["expert_rows_total", "1,3"] == 6  # expert, layer
    load = (await stack.client.get("/load/experts")).json()
    assert load == {"layers": [{"layer": 1, "rows": [2, 0]}, {"layer": 3, "rows": [1, 6]}]}


async def test_counters_end_in_total_and_everything_has_help(stack: FakeStack) -> None:
    text = (await stack.client.get("/metrics")).text
    kinds = [line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) > 25
    assert all(name.endswith("_total") == (kind == "counter") for name, kind in kinds)
    assert all(name.startswith(("consilium_", "process_")) for name, _ in kinds)
    assert all(f"# HELP {name} " in text for name, _ in kinds)


async def test_a_series_is_never_named_by_a_client(stack: FakeStack) -> None:
    await stack.client.get("/no/such/route")
    await stack.client.get("/v1/models/some-name")
    text = (await stack.client.get("/metrics")).text
    assert "no/such" not in text
    assert "some-name" not in text


@pytest.mark.parametrize(
    ("sent", "kept"), [("req-1.a:b_C", True), ("x" * 129, False), ("two words", False), ("a\tb", False), ("", False)]
)
async def test_request_ids(stack: FakeStack, sent: str, kept: bool) -> None:
    response = await stack.client.get("/health", headers={"x-request-id": sent})
    answered = response.headers["x-request-id"]
    assert (answered == sent) == kept
    assert answered


async def test_one_line_in_the_log_and_no_text(stack: FakeStack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stack.engine.failure = Failure("ExpertUnavailable", "gone")
    headers = {"x-request-id": "mine"}
    body = {"prompt": f"Say {WORD}", "stop": WORD, "seed": 77, "max_tokens": 3, "user": WORD}
    await stack.client.post("/v1/completions", json=body, headers=headers)
    stack.engine.failure = None
    await stack.client.post("/v1/completions", json={**body, "echo": True}, headers=headers)
    chat = {"messages": [{"role": "user", "content": WORD}], "max_tokens": 3, "temprature": WORD}
    await stack.client.post("/v1/chat/completions", json=chat, headers=headers)
    await stack.client.get(f"/{WORD}")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("gateway")]
    assert len(lines) == 4
    assert "request=mine" in lines[1]
    assert "completion_tokens=3 seed=77 finish=length" in lines[1]
    assert not any(WORD in line for line in lines)
