"""The cache's way to Redis against servers that are not there, are not Redis, or answer nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from pydantic import SecretStr

from consilium.config import CacheConfig
from consilium.errors import ConfigError
from gateway.cache import remote as remote_module
from gateway.cache.breaker import FAILURES
from gateway.cache.link import RedisLink
from gateway.cache.meter import CacheMeter
from gateway.cache.remote import RemoteCache, Rows
from gateway.cache.value import RowCodec
from gateway.mailbox import Mailbox
from gateway.messages import CacheStats
from tests.valkey import valkey

KEYS = [b"consilium:expert:%d" % number for number in range(3)]
ROWS = [bytes([number]) * 16 for number in range(len(KEYS))]
SECONDS = 60.0


class Engine:
    """What the engine's thread does with a cache."""

    def __init__(self, url: str, timeout: float = 0.5) -> None:
        self.mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
        self.meter = CacheMeter()
        codec = RowCodec(torch.float32, 2, 2, "salt")
        config = CacheConfig(redis=SecretStr(url), timeout=timeout)
        self.remote = RemoteCache(config, url, codec, self.mailbox, self.meter)
        self._errors: dict[str, dict[str, int]] = {}
        self.dropped = 0

    def fetch(self) -> Rows:
        return self.mailbox.drive(self.remote.fetch(KEYS))

    def work_until(self, condition: Callable[[], bool], fetching: bool = True) -> None:
        """Take events, and fetch again and again, until it is so."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            if fetching:
                assert self.fetch() == [None] * len(KEYS)
            self.mailbox.receive(0.02)

    def errors(self, operation: str) -> dict[str, int]:
        """By kind, since the start."""
        self._report()
        return self._errors.get(operation, {})

    def dropped_rows(self) -> int:
        self._report()
        return self.dropped

    def _report(self) -> None:
        stats: CacheStats | None = self.meter.take()
        for operation, kinds in (stats.errors if stats else {}).items():
            known = self._errors.setdefault(operation, {})
            for kind, count in kinds.items():
                known[kind] = known.get(kind, 0) + count
        self.dropped += stats.dropped if stats else 0


@contextmanager
def engine(url: str, timeout: float = 0.5) -> Iterator[Engine]:
    """With its I/O thread."""
    made = Engine(url, timeout)
    loop = asyncio.new_event_loop()
    serving = loop.create_task(made.remote.run())

    def serve() -> None:
        with contextlib.closing(loop), contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)

    thread = threading.Thread(target=serve, name="io")
    thread.start()
    try:
        made.work_until(lambda: made.remote.running, fetching=False)
        yield made
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join(SECONDS)


@contextmanager
def server_that(answers: Callable[[socket.socket], None]) -> Iterator[str]:
    """Its URL; every connection gets a thread with ``answers``, and is closed when that returns."""
    listener = socket.create_server(("127.0.0.1", 0))

    def connection(client: socket.socket) -> None:
        with client:
            try:
                answers(client)
            except OSError:  # the cache has hung up
                return

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # the end of the test
                return
            threading.Thread(target=connection, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def replying(reply: bytes) -> Callable[[socket.socket], None]:
    def answers(client: socket.socket) -> None:
        while client.recv(2**16):
            client.sendall(reply)

    return answers


def endless(client: socket.socket) -> None:
    client.recv(2**16)
    client.sendall(b"*3\r\n$536870912\r\n")
    while True:
        client.sendall(bytes(2**20))


def silent(client: socket.socket) -> None:
    while client.recv(2**16):
        pass


NONSENSE = {
    "another protocol": (replying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "connection"),
    "too few values": (replying(b"*2\r\n$-1\r\n$-1\r\n"), "refused"),
    "a number": (replying(b":3\r\n"), "refused"),
    "an error": (replying(b"-ERR what?\r\n"), "refused"),
    "half an answer": (lambda client: client.sendall(client.recv(2**16) and b"*3\r\n$5\r\nab"), "connection"),
    "a closed connection": (lambda client: client.close(), "connection"),
    "nothing": (silent, "timeout"),
    "an answer without end": (endless, "timeout"),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_a_miss_and_opens_the_breaker(kind: str) -> None:
    answers, error = NONSENSE[kind]
    with server_that(answers) as url, engine(url, timeout=0.05) as tested:
        tested.work_until(lambda: tested.remote.breakers["read"].state == "open")
        tested.work_until(lambda: sum(tested.errors("read").values()) >= FAILURES, fetching=False)
        assert tested.errors("read").get(error, 0) >= FAILURES - 1  # a connection may be reset before it is closed


def test_values_that_are_no_rows_are_misses_and_harm_nothing_else() -> None:
    values = b"*3\r\n$-1\r\n$3\r\nabc\r\n:7\r\n"
    with server_that(replying(values)) as url, engine(url) as tested:
        tested.work_until(lambda: tested.errors("read").get("value", 0) >= 2)
        assert tested.remote.breakers["read"].state == "closed"


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}"
    with engine(url) as tested:
        tested.work_until(lambda: tested.remote.breakers["read"].state == "open")
        tested.remote.store(KEYS, b"".join(ROWS))
        tested.work_until(lambda: tested.dropped_rows() == len(KEYS), fetching=False)
        assert tested.errors("write") == {"connection": 1}


def test_what_is_stored_is_found() -> None:
    with valkey() as server, engine(server.url) as tested:
        tested.remote.store(KEYS, b"".join(ROWS))
        found: list[list[bytes | None]] = []

        def look() -> bool:
            found.append([None if row is None else bytes(row) for row in tested.fetch()])
            return found[-1] == ROWS

        tested.work_until(look, fetching=False)
        assert all(row in (None, ROWS[number]) for each in found for number, row in enumerate(each))
        assert tested.errors("read") == tested.errors("write") == {}


def test_a_server_that_does_not_keep_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "WRITE_TIMEOUT", 0.2)
    keys, content = [b"%d" % number for number in range(2**18)], bytes(2**22)
    with server_that(silent) as url, engine(url) as tested:
        for _ in range(20):
            tested.remote.store(keys, content)  # returns at once; 80 MiB in all, of which 32 may wait
        tested.work_until(lambda: tested.dropped_rows() == 20 * len(keys), fetching=False)
        assert tested.errors("write") == {"timeout": 1}


def test_a_wrong_password_is_in_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with valkey() as server:
        with server.client() as client:
            client.config_set("requirepass", "right")
        with engine(f"unix://:hush-hush@{server.socket}") as tested:
            tested.work_until(lambda: tested.remote.breakers["read"].state == "open")
            assert tested.errors("read")["connection"] >= FAILURES
    assert "no read for" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize("query", ["nonsense=hush", "socket_timeout=hush", "db=hush"])
def test_a_url_that_cannot_be_used(query: str) -> None:
    with pytest.raises(ConfigError, match="the URL cannot be used") as error:
        RedisLink(f"redis://:hush@localhost:6379?{query}")
    assert "hush" not in str(error.value)
