"""Keys and values that outlive their sequence, for the next that begins alike: they are what it would compute.

A key or value depends on the tokens up to its position, on the weights and on the arithmetic. The gateway's are those
of this process; when those of an expert change, the engine forgets everything (``KVStore.forget``). So the tokens are
the whole key; positions count from 0 in every sequence.

Entries are found by their token ids, big-endian, in one sorted list: what has the longest prefix in common with a
text stands right before or right behind its place in the order, so a lookup compares a few dozen byte strings.
"""

from __future__ import annotations

import bisect
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gateway.kv_cache import BLOCK, Cache, Pool

TOKEN_BYTES = 4
_LEAST_EVICTED = 16  # blocks; taking one at a time would cost a call for every head and layer each time


@dataclass(slots=True, eq=False)
class Entry:
    """Computed positions that others may copy: kept after a sequence's end, or of one that is running."""

    key: bytes
    cache: Cache

    @property
    def tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Match:
    """The longest common prefix with anything there is."""

    entry: Entry
    tokens: int
    whole: bool  # the prefix is all that the entry has
    kept: bool  # no running sequence owns it


class PrefixCache:
    """Finds, lends, gives away and evicts entries. What it keeps counts as free to everybody else."""

    def __init__(self, pool: Pool, *, enabled: bool) -> None:
        self.kept_blocks = 0
        self.enabled = enabled
        self._pool = pool
        self._keys: list[bytes] = []  # sorted
        self._entries: dict[bytes, Entry] = {}
        self._kept: dict[bytes, None] = {}  # least recently used first
        self._evicted = 0

    def find(self, key: bytes, limit: int) -> Match | None:
        """What has the longest prefix in common with ``key``, of which at most ``limit`` tokens may be used."""
        place = bisect.bisect_left(self._keys, key)
        near = self._keys[max(0, place - 1) : place + 1]
        common, best = max(((common_tokens(key, each), each) for each in near), default=(0, b""))
        if min(common, limit) < BLOCK:  # not worth a copy
            return None
        # One that has nothing but the prefix can be taken over.
        entry = self._entries.get(key[: common * TOKEN_BYTES], self._entries[best])
        return Match(entry, min(common, limit), entry.tokens == common, entry.key in self._kept)

    def touch(self, entry: Entry) -> None:
        """Make a kept entry the last to be evicted."""
        self._kept[entry.key] = self._kept.pop(entry.key)

    def publish(self, entry: Entry | None, key: bytes, cache: Cache) -> Entry | None:
        """Let others copy the first positions, those of ``key``, of a running sequence. None where others have them.

        ``entry`` is what the same sequence had published before.
        """
        if entry is not None:
            self._remove(entry)
        if not self.enabled or len(key) < BLOCK * TOKEN_BYTES or self._is_covered(key):
            return None
        return self._insert(Entry(key, cache))

    def keep(self, entry: Entry | None, key: bytes, cache: Cache) -> None:
        """Take the cache of a sequence that has ended or gives way; the positions of ``key`` in it are valid."""
        entry = self.publish(entry, key, cache)
        if entry is None:
            self._pool.free(cache)
            return
        self._pool.trim(cache, entry.tokens)
        self.kept_blocks += cache.blocks
        self._kept[key] = None
        self._drop_what_it_covers(key)

    def take(self, entry: Entry, tokens: int) -> Entry | None:
        """Give a kept entry's cache, with its first ``tokens``, to a running sequence; as what others still find it."""
        self._give_up(entry)
        if tokens == entry.tokens:
            return entry
        self._pool.trim(entry.cache, tokens)
        return self.publish(entry, entry.key[: tokens * TOKEN_BYTES], entry.cache)

    def drop(self, entry: Entry) -> None:
        """Free a kept entry's cache."""
        self._give_up(entry)
        self._remove(entry)
        self._pool.free(entry.cache)

    def clear(self) -> None:
        """Free everything that is kept."""
        for key in list(self._kept):
            self.drop(self._entries[key])

    def withdraw(self, entry: Entry | None) -> None:
        """Forget what a running sequence has published."""
        if entry is not None:
            self._remove(entry)

    def evict(self, blocks: int) -> None:
        """Free that many blocks, the ends of those first that were not used for longest."""
        wanted = self._pool.free_blocks + blocks
        while self._pool.free_blocks < wanted:
            entry = self._entries[next(iter(self._kept))]
            before = entry.cache.blocks
            left = before - max(wanted - self._pool.free_blocks, _LEAST_EVICTED)
            if left > 0:
                self._shorten(entry, left * BLOCK)
            else:
                self.drop(entry)
            self._evicted += (before - entry.cache.blocks) * BLOCK

    def take_evicted(self) -> int:
        """Tokens evicted since the last call."""
        evicted, self._evicted = self._evicted, 0
        return evicted

    def _shorten(self, entry: Entry, tokens: int) -> None:
        """Keep only the first tokens, as the next to be evicted; nothing where others have them."""
        key = entry.key[: tokens * TOKEN_BYTES]
        self._give_up(entry)
        self._remove(entry)
        if self._is_covered(key):
            self._pool.free(entry.cache)
            return
        self._pool.trim(entry.cache, tokens)
        self._insert(Entry(key, entry.cache))
        self.kept_blocks += entry.cache.blocks
        self._kept = {key: None, **self._kept}

    def _give_up(self, entry: Entry) -> None:
        del self._kept[entry.key]
        self.kept_blocks -= entry.cache.blocks

    def _is_covered(self, key: bytes) -> bool:
        place = bisect.bisect_left(self._keys, key)
        return place < len(self._keys) and self._keys[place].startswith(key)

    def _drop_what_it_covers(self, key: bytes) -> None:
        """Drop kept entries that have nothing beyond the beginning of ``key``."""
        place = bisect.bisect_left(self._keys, key)
        while place and key.startswith(shorter := self._keys[place - 1]) and shorter in self._kept:
            self.drop(self._entries[shorter])
            place -= 1

    def _insert(self, entry: Entry) -> Entry:
        bisect.insort(self._keys, entry.key)
        self._entries[entry.key] = entry
        return entry

    def _remove(self, entry: Entry) -> None:
        del self._keys[bisect.bisect_left(self._keys, entry.key)]
        del self._entries[entry.key]


def token_key(tokens: Sequence[int]) -> bytes:
    """Token ids as bytes that sort as they do."""
    ids = array("I", tokens)
    if sys.byteorder == "little":
        ids.byteswap()
    return ids.tobytes()


def common_tokens(one: bytes, other: bytes) -> int:
    """Length of the longest common prefix, in tokens."""
    length = min(len(one), len(other)) // TOKEN_BYTES
    first, second = (np.frombuffer(each, dtype=np.uint32, count=length) for each in (one, other))
    different = np.flatnonzero(first != second)
    return int(different[0]) if different.size else length
