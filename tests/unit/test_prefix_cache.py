"""The prefix cache against the plainest search there is, its accounting, and the memory it gives back."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.kv_cache import BLOCK, KVPool, blocks_for, copy_positions
from gateway.prefix_cache import PrefixCache, common_tokens, token_key
from tests.memory import resident_bytes
from tests.unit.model_configs import tiny_config

CONFIG = tiny_config()
BYTES_PER_BLOCK = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 4 * BLOCK

# Few tokens, one of them large, so that many texts begin alike and the order of bytes is put to the test.
TEXTS = st.lists(st.sampled_from([0, 1, 70_000]), min_size=1, max_size=60)


def make(blocks: int, enabled: bool = True) -> tuple[KVPool, PrefixCache]:
    pool = KVPool(CONFIG, torch.float32, blocks * BYTES_PER_BLOCK)
    return pool, PrefixCache(pool, enabled=enabled)


def keep(pool: KVPool, cache: PrefixCache, text: list[int]) -> None:
    cache.keep(None, token_key(text), pool.allocate(len(text), len(text) + 5))


def common(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(TEXTS, TEXTS)
def test_common_tokens(one: list[int], other: list[int]) -> None:
    assert common_tokens(token_key(one), token_key(other)) == common(one, other)


@given(st.lists(TEXTS, max_size=12), TEXTS, st.integers(0, 60))
def test_the_longest_common_prefix_is_found(texts: list[list[int]], wanted: list[int], limit: int) -> None:
    pool, cache = make(1000)
    for text in texts:
        keep(pool, cache, text)
    best = min(max((common(wanted, text) for text in texts if len(text) >= BLOCK), default=0), limit)
    match = cache.find(token_key(wanted), limit)
    if best < BLOCK:
        assert match is None
        return
    assert match is not None
    assert (match.tokens, match.kept) == (best, True)
    assert match.entry.key.startswith(token_key(wanted[:best]))
    assert match.whole == (common_tokens(match.entry.key, token_key(wanted)) == match.entry.tokens)


@given(st.lists(st.tuples(TEXTS, st.integers(0, 6)), max_size=25), st.integers(4, 12))
def test_what_is_kept_and_what_is_free_is_all_there_is(story: list[tuple[list[int], int]], blocks: int) -> None:
    pool, cache = make(blocks)
    evicted = 0
    for text, wanted in story:
        if blocks_for(len(text)) > pool.free_blocks:
            cache.evict(blocks_for(len(text)) - pool.free_blocks)
        keep(pool, cache, text)
        wanted = min(wanted, cache.kept_blocks)
        free = pool.free_blocks
        cache.evict(wanted)
        assert pool.free_blocks >= free + wanted
        assert pool.free_blocks + cache.kept_blocks == pool.total_blocks
        evicted += cache.take_evicted()
    cache.clear()
    assert (pool.free_blocks, cache.kept_blocks) == (pool.total_blocks, 0)
    assert evicted % BLOCK == 0
    assert cache.find(token_key([0] * 60), 60) is None


def test_what_was_not_used_for_longest_is_evicted_first_and_from_its_end() -> None:
    pool, cache = make(100)
    texts = [[number] * 20 * BLOCK for number in range(3)]
    for text in texts:
        keep(pool, cache, text)
    oldest = cache.find(token_key(texts[0]), 1000)
    assert oldest is not None
    cache.touch(oldest.entry)
    cache.evict(1)  # sixteen at once: less is not worth the calls
    matches = [cache.find(token_key(text), 1000) for text in texts]
    assert [match and match.tokens for match in matches] == [20 * BLOCK, 4 * BLOCK, 20 * BLOCK]
    cache.evict(10)
    matches = [cache.find(token_key(text), 1000) for text in texts]
    assert [match and match.tokens for match in matches] == [20 * BLOCK, None, 4 * BLOCK]
    assert cache.take_evicted() == 36 * BLOCK


def test_what_another_entry_has_is_not_kept_twice() -> None:
    pool, cache = make(100)
    keep(pool, cache, [1] * 40)
    keep(pool, cache, [1] * 80)
    assert cache.kept_blocks == 5
    keep(pool, cache, [1] * 60)
    assert cache.kept_blocks == 5


def test_nothing_is_kept_where_it_is_turned_off() -> None:
    pool, cache = make(100, enabled=False)
    keep(pool, cache, [1] * 80)
    assert pool.free_blocks == 100
    assert cache.find(token_key([1] * 80), 80) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(tokens=st.integers(1, 60), capacity=st.integers(60, 90))
def test_a_copy_has_the_same_positions(dtype: torch.dtype, tokens: int, capacity: int) -> None:
    pool = KVPool(CONFIG, dtype, 100 * BYTES_PER_BLOCK)
    source, target = pool.allocate(60, 60), pool.allocate(60, capacity)
    for tensor in (source.keys, source.values):
        tensor.copy_(torch.randn(tensor.shape))
    copy_positions(source, target, tokens)
    blocks = [cache.keys.transpose(3, 4).flatten(2, 3)[:, :, :tokens] for cache in (source, target)]
    assert torch.equal(*blocks)
    assert torch.equal(source.values[:, :, :tokens], target.values[:, :, :tokens])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes pages back from the middle of an allocation")
def test_what_is_trimmed_is_the_systems_again_and_the_rest_is_as_it_was() -> None:
    config = tiny_config(num_kv_heads=4, head_dim=64)
    pool = KVPool(config, torch.float32, 2**28)
    cache = pool.allocate(16_000, 20_000)
    cache.keys[:, :, :1000] = 3.0
    cache.values[:, :, :16_000] = 5.0
    before, free = resident_bytes(os.getpid()), pool.free_blocks
    pool.trim(cache, 1601)
    given_back = before - resident_bytes(os.getpid())
    taken = 2 * config.num_layers * 4 * 64 * 4 * (16_000 - 1616)
    assert given_back > 0.9 * taken
    assert cache.blocks == 101
    assert pool.free_blocks == free + 1000 - 101
    assert bool((cache.keys[:, :, :101] == 3.0).all())
    assert bool((cache.values[:, :, : 101 * BLOCK] == 5.0).all())


def test_memory_that_is_not_paid_for_is_not_used() -> None:
    """Room of sequences that have gone must not lie committed under the room of others."""
    config = tiny_config(num_layers=8, num_kv_heads=4, head_dim=64)
    block_bytes = 2 * 8 * 4 * 64 * 4 * BLOCK
    pool = KVPool(config, torch.float32, 64 * block_bytes)
    before, most = resident_bytes(os.getpid()), 0
    for turn in range(20):
        caches = [pool.allocate(64, 200 + 97 * ((turn + number) % 9)) for number in range(16)]
        for cache in caches:
            cache.keys[:, :, : cache.blocks] = 1.0
            cache.values[:, :, : cache.committed] = 1.0
        most = max(most, resident_bytes(os.getpid()) - before)
        for cache in caches:
            pool.free(cache)
        del caches, cache
    assert pool.free_blocks == pool.total_blocks
    assert most < 1.5 * 64 * block_bytes
    assert resident_bytes(os.getpid()) - before < 0.3 * 64 * block_bytes
