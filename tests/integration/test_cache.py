"""With the expert-output cache, cold or warm, in memory or in a real server: the same bits as without."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cached_gateways import NEW_TOKENS, PROMPTS, ROWS, CachedGateway, cached_gateway, plain_gateway
from tests.stack import Process
from tests.valkey import listed_keys, valkey

BFLOAT16 = ("--dtype", "bfloat16")  # the shared worker's; the chaos tests use float32


@pytest.fixture(scope="module")
def expected(int8_worker: Process, tiny_mixtral: Path) -> Iterator[list[dict[str, Any]]]:
    """What a gateway without a cache answers."""
    with plain_gateway([int8_worker], tiny_mixtral, *BFLOAT16) as gateway:
        yield gateway.complete_all()


def test_cold_warm_and_shared(
    int8_worker: Process, tiny_mixtral: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    with valkey("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lfu") as server:
        section = f"{{memory: 16MiB, redis: '{server.url}', timeout: 1s}}"  # patient, as the machine may be busy
        with cached_gateway([int8_worker], tiny_mixtral, tmp_path, section, *BFLOAT16) as gateway:
            computed = check_memory(gateway, expected)
        with server.client() as client:
            assert 0 < len(listed_keys(client, "consilium:expert:*")) == client.dbsize() <= computed
        with cached_gateway([int8_worker], tiny_mixtral, tmp_path, section, *BFLOAT16) as gateway:
            assert gateway.complete_all() == expected
            gateway.wait_for(lambda: gateway.rows("memory") == ROWS)
            # The first lookup does not wait for the connection, and its rows are computed.
            assert gateway.misses("redis") <= len(PROMPTS[0])
            assert gateway.hits("redis") + gateway.misses("redis") == gateway.misses("memory")
            assert gateway.errors("read", "value") == 0


def check_memory(gateway: CachedGateway, expected: list[dict[str, Any]]) -> float:
    """Everything is computed once, written, and found the second time; returns how many rows were computed."""
    assert gateway.complete_all() == expected  # cold
    gateway.wait_for(lambda: gateway.rows("memory") == ROWS and gateway.settled(gateway.misses("redis")))
    computed, frames = gateway.misses("redis"), gateway.metric("consilium_worker_frames_total")
    assert gateway.written() == computed
    assert gateway.complete_all() == expected  # warm
    gateway.wait_for(lambda: gateway.rows("memory") == 2 * ROWS)
    assert gateway.misses("memory") == computed
    assert gateway.metric("consilium_worker_frames_total") == frames  # no worker was asked anything
    assert 0 < gateway.metric("consilium_cache_bytes") <= 16 * 2**20
    return computed


def test_a_memory_that_is_too_small_and_a_mixed_batch(
    int8_worker: Process, tiny_mixtral: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    with (
        cached_gateway([int8_worker], tiny_mixtral, tmp_path, "{memory: 20KiB}", *BFLOAT16) as gateway,
        ThreadPoolExecutor(8) as pool,
    ):
        assert [gateway.complete_all(), gateway.complete_all()] == [expected, expected]
        gateway.wait_for(lambda: gateway.metric("consilium_cache_evictions_total") > 0)
        assert gateway.metric("consilium_cache_bytes") <= 20 * 2**10
        answers = list(pool.map(gateway.complete, PROMPTS * 4))
        tokens = [len(answer["logprobs"]["tokens"]) for answer in answers]
        assert tokens == [len(prompt) + NEW_TOKENS for prompt in PROMPTS * 4]
