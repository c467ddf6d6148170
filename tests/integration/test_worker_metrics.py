"""A worker's own port for Prometheus: off unless asked for, and a clear error where it cannot be had."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx

from tests.stack import Process, launch, running, worker_argv


def test_no_port_unless_asked_for(int8_worker: Process) -> None:
    assert int8_worker.metrics == ""


def test_the_port_is_announced_and_answers(tiny_mixtral: Path) -> None:
    with running(worker_argv("0-1", "--model", str(tiny_mixtral), "--metrics-port", "0")) as worker:
        text = httpx.get(worker.metrics).raise_for_status().text
    assert 'consilium_expert_service_experts{group="experts",model_name="tiny"} 6.0' in text.splitlines()


def test_a_port_that_is_taken(tiny_mixtral: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        worker = launch(worker_argv("0-1", "--model", str(tiny_mixtral), "--metrics-port", str(port)))
        assert worker.wait() == 1
    assert worker.popen.stdout is not None
    assert worker.popen.stdout.read() == ""
    worker.popen.stdout.close()
    assert f"error: cannot listen on 127.0.0.1 port {port} for metrics" in worker.log()
    assert "Traceback" not in worker.log()
