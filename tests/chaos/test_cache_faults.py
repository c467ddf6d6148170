"""Redis killed, slow, full, or filled with garbage: no request fails, no bit changes, little time is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gateway.cache.breaker import FAILURES
from gateway.cache.value import RowCodec
from tests.cached_gateways import PROMPTS, ROWS, CachedGateway, cached_gateway, plain_gateway
from tests.stack import Process, running, worker_argv
from tests.tiny_models import save_mixtral
from tests.valkey import listed_keys, slow_proxy, valkey

LONG = 300  # new tokens
TOP_K, HIDDEN = 2, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny")


@pytest.fixture(scope="module")
def worker(model: Path) -> Iterator[Process]:
    with running(worker_argv("all", "--model", str(model))) as process:
        yield process


@pytest.fixture(scope="module")
def expected(worker: Process, model: Path) -> Iterator[list[dict[str, Any]]]:
    """What a gateway without a cache answers; the long one last."""
    with plain_gateway([worker], model) as gateway:
        yield [*gateway.complete_all(), gateway.complete(PROMPTS[1], max_tokens=LONG)]


@pytest.fixture
def start(worker: Process, model: Path, tmp_path: Path) -> Any:
    @contextmanager
    def start(url: str, timeout: str) -> Iterator[CachedGateway]:
        # Nothing is kept in memory, so that every row is asked from Redis.
        section = f"{{memory: 0, redis: '{url}', timeout: {timeout}}}"
        with cached_gateway([worker], model, tmp_path, section) as gateway:
            yield gateway

    return start


def test_killed_in_the_middle_and_back_again(start: Any, expected: list[dict[str, Any]]) -> None:
    with valkey() as server, start(server.url, "1s") as gateway, ThreadPoolExecutor(1) as pool:
        gateway.wait_for(lambda: gateway.hits("redis") > 0, busy=True)
        answer = pool.submit(gateway.complete, PROMPTS[1], max_tokens=LONG)
        gateway.wait_for(lambda: gateway.metric("consilium_num_requests_running") == 1 or answer.done())
        server.kill()
        assert answer.result() == expected[-1]
        assert gateway.complete_all() == expected[:-1]
        gateway.wait_for(lambda: gateway.breaker("read") == "open", busy=True)
        assert gateway.errors("read", "connection") >= FAILURES
        server.start()  # without any key
        found = gateway.hits("redis")
        gateway.wait_for(lambda: gateway.hits("redis") > found, busy=True)
        gateway.wait_for(lambda: {gateway.breaker(each) for each in ("read", "write")} == {"closed"}, busy=True)
        assert gateway.complete_all() == expected[:-1]


def test_slow(start: Any, expected: list[dict[str, Any]]) -> None:
    with valkey() as server, slow_proxy(server.socket) as proxy, start(proxy.url, "100ms") as gateway:
        gateway.wait_for(lambda: gateway.hits("redis") > 0, busy=True)
        spent, before = gateway.metric("consilium_cache_lookup_seconds_total", tier="redis"), gateway.rows("redis")
        proxy.delay = 2.0
        gateway.wait_for(lambda: gateway.breaker("read") == "open", busy=True)
        assert gateway.complete_all() == expected[:-1]
        gateway.wait_for(lambda: gateway.rows("redis") >= before + ROWS)
        # Only what opens the breaker was waited for, each for the timeout; without it there were hundreds of lookups.
        spent = gateway.metric("consilium_cache_lookup_seconds_total", tier="redis") - spent
        assert spent < 2.0, f"{spent} s, and a single answer takes 2 s"
        assert gateway.errors("read", "timeout") + gateway.errors("read", "connection") < 3 * FAILURES
        proxy.delay = 0.0
        found = gateway.hits("redis")
        gateway.wait_for(lambda: gateway.hits("redis") > found and gateway.breaker("read") == "closed", busy=True)
        assert gateway.complete_all() == expected[:-1]


def test_garbage_of_every_kind_and_then_no_room(start: Any, expected: list[dict[str, Any]]) -> None:
    with valkey("--maxmemory-policy", "noeviction") as server, start(server.url, "1s") as gateway:
        gateway.wait_for(lambda: gateway.breaker("read") == gateway.breaker("write") == "closed", busy=True)
        assert gateway.complete_all() == expected[:-1]
        # What the engine counts is told once a second: all of it first, then whether it is written.
        gateway.wait_for(lambda: gateway.rows("redis") >= ROWS and gateway.settled(gateway.misses("redis")))
        with server.client() as client:
            spoilt = spoil(client)
        assert spoilt > 100
        assert gateway.complete_all() == expected[:-1]
        # Lists and hashes look like nothing to MGET.
        gateway.wait_for(lambda: gateway.errors("read", "value") > spoilt / 2)
        gateway.wait_for(lambda: gateway.settled(gateway.misses("redis")))
        found = gateway.hits("redis")
        assert gateway.complete_all() == expected[:-1]  # good rows have taken the place of the garbage
        gateway.wait_for(lambda: gateway.hits("redis") >= found + spoilt)
        with server.client() as client:
            client.flushall()
            client.config_set("maxmemory", 1)
        assert gateway.complete_all() == expected[:-1]
        gateway.wait_for(lambda: gateway.breaker("write") == "open", busy=True)
        assert gateway.errors("write", "full") >= FAILURES
        assert gateway.breaker("read") == "closed"
        assert gateway.complete_all() == expected[:-1]


def spoil(client: Any) -> int:
    """Put something else under every key; returns how many there are."""
    keys = listed_keys(client, "consilium:expert:*")
    values: list[bytes] = client.mget(keys)
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        kinds = garbage(key, value, values[number - 1])
        command, *arguments = kinds[number % len(kinds)]
        client.delete(key)
        client.execute_command(command, key, *arguments)
    return len(keys)


def garbage(key: bytes, value: bytes, other_value: bytes) -> list[tuple[str | bytes, ...]]:
    """Commands, without the key, that put what is no row there."""
    return [
        ("RPUSH", value),
        ("HSET", "field", value),
        ("SADD", value),
        ("SET", b""),
        ("SET", "garbage"),
        ("SET", value[:-4]),
        ("SET", value + value),
        ("SET", value * 2000),  # a megabyte
        ("SET", bytes(len(value))),
        ("SET", value[:-1] + bytes([value[-1] ^ 1])),  # a flipped bit of the data
        ("SET", bytes([value[0] ^ 1]) + value[1:]),  # a flipped bit of the header
        ("SET", other_value),
        ("SET", RowCodec(torch.float32, TOP_K, HIDDEN, "").encode(key, bytes(4 * TOP_K * HIDDEN))),
        ("SET", RowCodec(torch.bfloat16, TOP_K, HIDDEN - 1, "").encode(key, bytes(2 * TOP_K * (HIDDEN - 1)))),
        ("SET", RowCodec(torch.bfloat16, TOP_K, HIDDEN, "another salt").encode(key, value[-2 * TOP_K * HIDDEN :])),
    ]
