"""The gateway's processes: clients that leave, draining, the engine's death, start-up errors."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stack import Stack, launch, stack
from tests.tiny_models import save_mixtral

CONTEXT = 100_000
ENDLESS: dict[str, Any] = {"prompt": [5], "max_tokens": CONTEXT - 1, "ignore_eos": True, "seed": 1}
LONG: dict[str, Any] = {**ENDLESS, "max_tokens": 400}
SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can go on for longer than any test."""
    return save_mixtral(tmp_path_factory.mktemp("model") / "endless", max_position_embeddings=CONTEXT)


@pytest.fixture
def served(model: Path) -> Iterator[Stack]:
    with stack(model) as running:
        yield running


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[Stack]:
    with stack(model) as running:
        yield running


def post(served: Stack, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/completions", json={**ENDLESS, **body}, timeout=SECONDS)


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll what only another process knows."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def metric(served: Stack, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics", timeout=SECONDS).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"consilium_{name}{{"))


def engine_pid(served: Stack) -> int:
    children = Path(f"/proc/{served.gateway.pid}/task/{served.gateway.pid}/children").read_text("ascii").split()
    assert len(children) == 1
    return int(children[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_space(shared: Stack, stream: bool) -> None:
    body = {**ENDLESS, "n": 4, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{shared.url}/v1/completions", json=body, timeout=SECONDS) as response:
            next(response.iter_bytes())
            until(lambda: metric(shared, "kv_cache_usage_perc") > 0, "no space is taken")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{shared.url}/v1/completions", json=body, timeout=httpx.Timeout(SECONDS, read=1.0))
    until(lambda: metric(shared, "num_requests_running") == 0, "the sequences of a client that left go on")
    assert metric(shared, "kv_cache_usage_perc") == 0
    assert httpx.get(f"{shared.url}/load", timeout=SECONDS).json()["open_sequences"] == 0


def test_sigterm_lets_running_requests_finish(served: Stack) -> None:
    began = threading.Event()

    def answer() -> str:
        with httpx.stream(
            "POST", f"{served.url}/v1/completions", json={**LONG, "stream": True}, timeout=SECONDS
        ) as got:
            chunks = got.iter_bytes()
            first = next(chunks)
            began.set()
            return (first + b"".join(chunks)).decode()

    with ThreadPoolExecutor() as pool:
        answering = pool.submit(answer)
        assert began.wait(SECONDS)
        os.kill(served.gateway.pid, signal.SIGTERM)
        until(lambda: httpx.get(f"{served.url}/ready", timeout=SECONDS).status_code == 503, "still ready")
        assert post(served).status_code == 503
        assert answering.result().endswith("data: [DONE]\n\n")
    assert served.gateway.wait() == 0


def test_a_second_signal_ends_it_at_once(served: Stack) -> None:
    body = {**ENDLESS, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=SECONDS) as got:
        next(got.iter_bytes())
        engine = engine_pid(served)
        os.kill(served.gateway.pid, signal.SIGTERM)
        until(lambda: "shutting down" in served.gateway.log(), "no word of the first signal")
        os.kill(served.gateway.pid, signal.SIGTERM)
        assert served.gateway.wait() == 128 + signal.SIGTERM
    until(lambda: not _alive(engine), "the engine process is left over")


def test_the_engines_death_is_the_gateways_end(served: Stack) -> None:
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(post, served)
        until(lambda: metric(served, "num_requests_running") > 0, "the request does not run")
        os.kill(engine_pid(served), signal.SIGKILL)
        response = answering.result()
    assert response.status_code == 503
    assert "engine" in response.json()["error"]["message"]
    assert served.gateway.wait() == 1
    assert "engine process ended by itself with status -9" in served.gateway.log()


def test_the_gateways_death_is_the_engines_end(served: Stack) -> None:
    engine = engine_pid(served)
    served.gateway.stop(signal.SIGKILL)
    until(lambda: not _alive(engine), "the engine process is left over")


def test_an_address_in_use_is_one_line(shared: Stack, model: Path) -> None:
    port = shared.url.rpartition(":")[2]
    gateway = launch(["gateway", "--model", str(model), "--port", port])
    assert gateway.wait() == 1
    assert gateway.log().startswith(f"error: cannot listen on 127.0.0.1 port {port}")
    assert "Traceback" not in gateway.log()


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not waited for by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
