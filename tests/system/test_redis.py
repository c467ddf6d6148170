"""A real Redis, with TLS and a user who may do nothing but GET, MGET and SET, behind a gateway's cache."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.cached_gateways import ROWS, cached_gateway, plain_gateway
from tests.stack import Process, running, worker_argv
from tests.tiny_models import save_mixtral
from tests.valkey import listed_keys

PASSWORD = "not-in-the-log"  # noqa: S105 (of a server that lives for one test)
USERS = f"""
user default on nopass ~* &* +@all
user gateway on >{PASSWORD} ~consilium:expert:* resetchannels -@all +get +mget +set
"""


@dataclass(frozen=True)
class Server:
    """A running redis-server; its administrator needs no password."""

    port: int
    certificate: Path

    def url(self, password: str) -> str:
        return f"rediss://gateway:{password}@localhost:{self.port}?ssl_ca_certs={self.certificate}"

    def administrator(self) -> Any:
        return redis.Redis(host="localhost", port=self.port, ssl=True, ssl_ca_certs=str(self.certificate))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = shutil.which("redis-server")
    assert program is not None, "run make test-system: it installs redis-server"
    folder = tmp_path_factory.mktemp("redis")
    certificate, key = _certify(folder)
    (folder / "users.acl").write_text(USERS)
    port = _free_port()
    tls = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    keep = ["--save", "", "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu", "--dir", str(folder)]
    access = ["--bind", "127.0.0.1", "--tls-auth-clients", "no", "--aclfile", str(folder / "users.acl")]
    command = [program, "--port", "0", *tls, *keep, *access]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            written = ""
            while "Ready to accept connections" not in written:
                line = process.stdout.readline()
                assert line, written
                written += line
            yield Server(port, certificate)
        finally:
            process.terminate()


def _certify(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that is its own authority, and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny")


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[Process]:
    with running(worker_argv("all", "--model", str(model))) as process:
        yield process


def test_tls_and_the_three_commands_are_enough(server: Server, worker: Process, model: Path, tmp_path: Path) -> None:
    with plain_gateway([worker], model) as gateway:
        expected = gateway.complete_all()
    section = f"{{memory: 0, redis: '{server.url(PASSWORD)}', timeout: 1s, ttl: 1h}}"
    with cached_gateway([worker], model, tmp_path, section) as gateway:
        gateway.wait_for(lambda: gateway.breaker("read") == gateway.breaker("write") == "closed", busy=True)
        assert gateway.complete_all() == expected
        gateway.wait_for(lambda: gateway.settled(gateway.misses("redis")))
        before = gateway.hits("redis")
        assert gateway.complete_all() == expected
        gateway.wait_for(lambda: gateway.hits("redis") >= before + ROWS)  # told once a second: ``before`` may be old
        assert PASSWORD not in gateway.process.log()
    with server.administrator() as administrator:
        assert administrator.acl_log() == []  # nothing was tried that is not allowed
        keys = listed_keys(administrator, "*")
        assert len(keys) > ROWS / 2
        assert all(3000 < administrator.ttl(key) <= 3600 for key in keys[:10])
