"""The gateway's two processes from start to end: draining, a second signal, either one's death, a taken address."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.stack import Process, launch, running, wait_ready, worker_argv
from tests.tiny_models import save_mixtral

CONTEXT = 100_000
ENDLESS: dict[str, Any] = {"prompt": [5], "max_tokens": CONTEXT - 1, "ignore_eos": True, "seed": 1}
SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can go on for longer than any test."""
    return save_mixtral(tmp_path_factory.mktemp("model") / "endless", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[Process]:
    with running(worker_argv("all", "--model", str(model), "--quantization", "none")) as process:
        yield process


@pytest.fixture
def gateway(model: Path, worker: Process) -> Iterator[Process]:
    flags = ["--quantization", "none", "--port", "0", "--threads", "1", "--group-endpoint", f"experts={worker.address}"]
    with running(["gateway", "--model", str(model), *flags]) as process:
        wait_ready(process)
        yield process


def post(gateway: Process, **body: Any) -> httpx.Response:
    return httpx.post(f"{gateway.address}/v1/completions", json={**ENDLESS, **body}, timeout=SECONDS)


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll what only another process knows."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def open_sequences(gateway: Process) -> int:
    return int(httpx.get(f"{gateway.address}/load", timeout=SECONDS).json()["open_sequences"])


def engine_pid(gateway: Process) -> int:
    (child,) = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text("ascii").split()
    return int(child)


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not waited for by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_sigterm_lets_running_requests_finish(gateway: Process) -> None:
    began = threading.Event()

    def answer() -> str:
        body = {**ENDLESS, "max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{gateway.address}/v1/completions", json=body, timeout=SECONDS) as response:
            parts = response.iter_bytes()
            first = next(parts)
            began.set()
            return (first + b"".join(parts)).decode()

    with ThreadPoolExecutor() as pool:
        answering = pool.submit(answer)
        assert began.wait(SECONDS)
        os.kill(gateway.pid, signal.SIGTERM)
        assert answering.result().endswith("data: [DONE]\n\n")
    assert gateway.wait() == 0
    assert "1 sequences may finish" in gateway.log()


def test_a_second_signal_ends_it_at_once(gateway: Process) -> None:
    engine = engine_pid(gateway)
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(post, gateway)
        until(lambda: open_sequences(gateway) == 1, "the request does not run")
        os.kill(gateway.pid, signal.SIGTERM)
        # While it drains it says so, and takes nothing new.
        until(lambda: httpx.get(f"{gateway.address}/ready", timeout=SECONDS).status_code == 503, "still ready")
        assert post(gateway).status_code == 503
        os.kill(gateway.pid, signal.SIGTERM)
        assert gateway.wait() == 128 + signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            answering.result()
    until(lambda: not alive(engine), "the engine process is left over")


def test_the_engines_death_is_the_gateways_end(gateway: Process) -> None:
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(post, gateway)
        until(lambda: open_sequences(gateway) == 1, "the request does not run")
        os.kill(engine_pid(gateway), signal.SIGKILL)
        response = answering.result()
    assert response.status_code == 503
    assert "engine" in response.json()["error"]["message"]
    assert gateway.wait() == 1
    assert "engine process ended by itself with status -9" in gateway.log()


def test_the_gateways_death_is_the_engines_end(gateway: Process) -> None:
    engine = engine_pid(gateway)
    gateway.stop(signal.SIGKILL)
    until(lambda: not alive(engine), "the engine process is left over")


def test_a_taken_address_is_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gateway = launch(["gateway", "--model", str(model), "--port", str(port)])
        assert gateway.wait() == 1
    assert gateway.log().startswith(f"error: cannot listen on 127.0.0.1 port {port}")
    assert "Traceback" not in gateway.log()
