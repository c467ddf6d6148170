"""`python -m consilium.health`, as the images' health checks and other probes run it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.stack import Process


def probe(*arguments: str) -> tuple[int, str]:
    """Exit status and standard error."""
    command = [sys.executable, "-m", "consilium.health", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.stdout == ""
    return finished.returncode, finished.stderr


@contextmanager
def http_server(status: int) -> Iterator[str]:
    """Answers every GET with ``status`` and the path; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(self.path.encode())

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def grpc_server(status: health_pb2.HealthCheckResponse.ServingStatus | None) -> Iterator[str]:
    """A server whose health service says ``status``, or that has no health service."""
    server = grpc.server(ThreadPoolExecutor(1))
    if status is not None:
        servicer = health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_worker_serves(float_worker: Process) -> None:
    assert probe(float_worker.address) == (0, "")


def test_http_must_answer_200() -> None:
    with http_server(200) as url:
        assert probe(f"{url}/ready") == (0, "")
    with http_server(503) as url:
        assert probe(f"{url}/ready") == (1, f"{url}/ready: 503 /ready\n")


def test_grpc_must_say_serving() -> None:
    with grpc_server(health_pb2.HealthCheckResponse.SERVING) as url:
        assert probe(url) == (0, "")
    with grpc_server(health_pb2.HealthCheckResponse.NOT_SERVING) as url:
        assert probe(url) == (1, f"{url}: it says that it does not serve\n")
    with grpc_server(None) as url:
        code, error = probe(url)
        assert (code, "UNIMPLEMENTED" in error) == (1, True)


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_nobody_there(scheme: str) -> None:
    code, error = probe(f"{scheme}://127.0.0.1:1")
    assert code == 1
    assert "refused" in error


@pytest.mark.parametrize(
    "arguments", [(), ("http://a:1", "http://a:1"), ("ftp://a:1",), ("grpc://a",), ("grpc://a:x",)]
)
def test_usage(arguments: tuple[str, ...]) -> None:
    code, error = probe(*arguments)
    assert code == 2
    assert error.startswith("usage: ")
