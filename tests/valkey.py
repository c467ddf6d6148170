"""A real Valkey server for tests, that can be killed and come back, and a proxy that makes it slow."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from consilium.embedded_cache import valkey_server

START_SECONDS = 20.0


@dataclass
class Valkey:
    """A server on a unix socket; without any keys after a restart."""

    folder: Path
    arguments: tuple[str, ...] = ()
    _process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return str(self.folder / "valkey.sock")

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def client(self) -> Any:  # the types of redis-py's commands are those of its asynchronous client, too
        return redis.Redis(unix_socket_path=self.socket)

    def start(self) -> None:
        """Return once it answers."""
        fixed = ("--port", "0", "--unixsocket", self.socket, "--save", "", "--dir", str(self.folder))
        with (self.folder / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen([valkey_server(), *fixed, *self.arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise AssertionError((self.folder / "valkey.log").read_text()) from None
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash does."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_SECONDS)
            self._process = None


@contextmanager
def valkey(*arguments: str) -> Iterator[Valkey]:
    """A running server with these arguments, such as ``--maxmemory``."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        server = Valkey(Path(folder), arguments)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class SlowProxy:
    """Forwards connections to a unix socket; what the server answers is held back for ``delay`` seconds."""

    def __init__(self, target: str) -> None:
        self.delay = 0.0
        self.port = 0
        self._target = target
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def serve(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._closing.wait()
        server.close()

    def close(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._closing.set)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, ours, False), self._pump(theirs, writer, True))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, held: bool) -> None:
        try:
            while data := await source.read(2**16):
                if held and self.delay:
                    await asyncio.sleep(self.delay)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # the other side has left, which is what the tests make it do
        finally:
            sink.close()


@contextmanager
def slow_proxy(target: str) -> Iterator[SlowProxy]:
    """A proxy before the unix socket ``target``, on a port of the system's choice."""
    proxy = SlowProxy(target)
    started = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(proxy.serve(started)), name="slow-proxy")
    thread.start()
    assert started.wait(START_SECONDS)
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join(START_SECONDS)


def listed_keys(client: Any, pattern: str) -> list[bytes]:
    """All keys like ``pattern``, as SCAN finds them."""
    return sorted(client.scan_iter(pattern, count=1000))
