"""The real stack under load and under loss: every request gets its own tokens, and nothing it held stays behind."""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.integration.completions import (
    DEADLINE_SECONDS,
    Completion,
    await_metric,
    body_of,
    complete,
    events,
    metric,
)
from tests.stack import Stack, running, stack, wait_ready, worker_argv
from tests.tiny_models import save_mixtral

REQUESTS = 32
LONG = 7000  # tokens: far more than are computed while a client looks around and leaves
PROMPT = list(range(40, 70))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 experts in each of 3 layers, and a long context."""
    return save_mixtral(tmp_path_factory.mktemp("serving") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Stack]:
    """Two workers with half of the experts each."""
    with stack(model, workers=2) as running_stack:
        yield running_stack


def test_a_gateway_with_experts_of_its_own_needs_no_workers(served: Stack, model: Path, tmp_path: Path) -> None:
    settings = tmp_path / "gateway.yaml"
    settings.write_text("gateway: {local_experts: true}")
    with stack(model, workers=(), gateway_args=["--config", str(settings)]) as alone:
        complete(alone.url, PROMPT, 12).assert_same(complete(served.url, PROMPT, 12))


def test_concurrent_requests_get_their_own_tokens(served: Stack) -> None:
    random_ = random.Random(1)
    asked = [
        ([random_.randrange(4, 384) for _ in range(random_.randint(1, 60))], random_.randint(1, 40))
        for _ in range(REQUESTS)
    ]
    alone = [complete(served.url, prompt, length) for prompt, length in asked]
    with ThreadPoolExecutor(REQUESTS) as pool:
        together = list(
            pool.map(lambda each: complete(served.url, *each[1], stream=each[0] % 2 == 1), enumerate(asked))
        )
    for (prompt, length), expected, found in zip(asked, alone, together, strict=True):
        expected.assert_same(found)
        assert (found.finish_reason, found.error) == ("length", None)
        counts = {"prompt_tokens": len(prompt), "completion_tokens": length, "total_tokens": len(prompt) + length}
        assert {key: found.usage[key] for key in counts} == counts


def test_usage_counts_every_prompt_and_choice(served: Stack) -> None:
    body = body_of(PROMPT, 5, n=3) | {"prompt": [PROMPT, PROMPT[:7]]}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=DEADLINE_SECONDS).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    counts = {"prompt_tokens": 37, "completion_tokens": 30, "total_tokens": 67}
    assert {key: answer["usage"][key] for key in counts} == counts


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_space(served: Stack, stream: bool) -> None:
    generated = metric(served.url, "generation_tokens_total")
    address = urlsplit(served.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body_of(PROMPT, LONG, stream=stream, n=2)), headers)
    await_metric(served.url, "generation_tokens_total", lambda value: value > generated)
    assert metric(served.url, "kv_cache_usage_perc") > 0
    connection.close()
    await_metric(served.url, "kv_cache_usage_perc", lambda value: value == 0)
    assert metric(served.url, "num_requests_running") == 0
    assert metric(served.url, "generation_tokens_total") - generated < LONG, "it was not cut short"


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_a_killed_worker_with_a_replica_is_not_noticed(model: Path, quantization: str) -> None:
    with stack(model, workers=2, replicas=2, quantization=quantization) as served:
        expected = complete(served.url, PROMPT, 100)
        found = Completion()
        for event in events(served.url, body_of(PROMPT, 100, stream=True)):
            found.add(event)
            if len(found.tokens) == 1:
                served.workers[0].stop(signal.SIGKILL)
        assert (found.finish_reason, found.error, len(found.tokens)) == ("length", None, 100)
        expected.assert_same(found)
        await_metric(served.url, "worker_connected", lambda value: value == 1)
        complete(served.url, PROMPT, 100).assert_same(expected)


def test_the_last_holder_of_an_expert_is_missed_by_name(model: Path) -> None:
    with stack(model, workers=["0-1", "2-3"]) as served:
        expected = complete(served.url, PROMPT, 20)
        found = Completion()
        for event in events(served.url, body_of(PROMPT, LONG, stream=True)):
            found.add(event)
            if len(found.tokens) == 1:
                served.workers[1].stop(signal.SIGKILL)
        assert found.error is not None, "the stream went on without its experts"
        assert found.error["type"] == "unavailable_error"

        not_ready = _await_not_ready(served.url)
        assert "experts 2-3 of layers 0-2" in not_ready["message"]
        refused = httpx.post(f"{served.url}/v1/completions", json=body_of(PROMPT, 20), timeout=DEADLINE_SECONDS)
        error = refused.json()["error"]
        assert (refused.status_code, set(error)) == (503, {"message", "type", "param", "code"})
        assert error["type"] == "unavailable_error"
        assert re.search(r"experts? [23]\b", error["message"])
        assert metric(served.url, "kv_cache_usage_perc") == 0

        port = served.workers[1].address.rpartition(":")[2]
        again = worker_argv("2-3", "--model", str(model), "--quantization", "none", "--port", port)
        with running(again):
            wait_ready(served.gateway)
            complete(served.url, PROMPT, 20).assert_same(expected)


def _await_not_ready(url: str) -> dict[str, Any]:
    """The error object of /ready once it is one."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (response := httpx.get(f"{url}/ready", timeout=DEADLINE_SECONDS)).status_code != 503:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.02)
    error: dict[str, Any] = response.json()["error"]
    return error
