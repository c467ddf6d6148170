"""The cache server as k8s/ configures it: its init script and file, on a real server, asked by the gateway's client.

The server is Valkey, which takes Redis' configuration and access lists as they are.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from consilium.embedded_cache import valkey_server
from gateway.cache.link import RedisLink, mget_command, set_command
from tests.system.kubernetes.manifests import Cluster, Manifest, render

PASSWORD = secrets.token_hex(16)
FORBIDDEN = (
    "PING",
    "DEL key",
    "KEYS *",
    "SCAN 0",
    "CONFIG GET maxmemory",
    "FLUSHALL",
    "INFO",
    "EVAL return{} 0",
    "EXISTS key",
)


@pytest.fixture(scope="module")
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running server, in a folder of its own instead of the container's paths."""
    folder = tmp_path_factory.mktemp("redis")
    cluster = Cluster(render("production"))
    pod = next(each.pod for each in cluster.workloads() if each.name == "redis")
    _write_configuration(cluster, pod, folder)
    arguments = [each.replace("/etc/redis", str(folder)) for each in pod["containers"][0]["args"]]
    local = ["--port", "0", "--unixsocket", str(folder / "socket"), "--dir", str(folder)]
    with subprocess.Popen([valkey_server(), *arguments, *local], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = []
            for line in server.stdout:
                lines.append(line)
                if "ready to accept connections" in line.lower():
                    break
            assert server.poll() is None, "".join(lines)
            yield folder / "socket"
        finally:
            server.terminate()


def _write_configuration(cluster: Cluster, pod: Manifest, folder: Path) -> None:
    config = cluster.find("ConfigMap", "redis-config")
    assert config is not None
    (folder / "redis.conf").write_text(config["data"]["redis.conf"].replace("/run/redis", str(folder)), "utf-8")
    (script,) = pod["initContainers"][0]["args"]
    environment = {"REDIS_PASSWORD": PASSWORD, "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-c", script.replace("/run/redis", str(folder))], env=environment, check=True)


def test_the_gateways_client_reads_and_writes(socket_path: Path) -> None:
    async def write_and_read() -> list[object]:
        link = RedisLink(f"unix://consilium:{PASSWORD}@{socket_path}?db=0")
        try:
            written = await link.call(set_command(b"key", b"value", None), 1, 5.0)
            return written + await link.call(mget_command([b"key", b"other"]), 1, 5.0)
        finally:
            await link.close()

    assert asyncio.run(write_and_read()) == [b"OK", [b"value", None]]


@pytest.mark.parametrize("command", FORBIDDEN)
def test_nothing_else_is_allowed(socket_path: Path, command: str) -> None:
    client = redis.Redis(unix_socket_path=str(socket_path), username="consilium", password=PASSWORD)
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())


@pytest.mark.parametrize(
    ("username", "password"), [(None, None), ("default", ""), ("consilium", "wrong"), ("consilium", "")]
)
def test_nobody_else_is_let_in(socket_path: Path, username: str | None, password: str | None) -> None:
    client = redis.Redis(unix_socket_path=str(socket_path), username=username, password=password)
    with pytest.raises(redis.exceptions.AuthenticationError):
        client.get("key")


def test_the_access_list_is_readable_by_its_owner_alone(socket_path: Path) -> None:
    assert (socket_path.parent / "users.acl").stat().st_mode & 0o077 == 0
