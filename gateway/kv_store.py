"""Which sequence has which cache: what is given at the start, grown, published to others, and kept at the end."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.kv_cache import BLOCK, Cache, Pool, blocks_for
from gateway.prefix_cache import TOKEN_BYTES, Match, PrefixCache, token_key
from gateway.sequence import Sequence


class KVStore:
    """The memory for keys and values. What is only kept counts as free: it is evicted where space is needed."""

    def __init__(self, pool: Pool, *, prefix_cache: bool = True) -> None:
        self.pool, self.prefixes = pool, PrefixCache(pool, enabled=prefix_cache)
        self._queries, self._hits = 0, 0

    @property
    def free_blocks(self) -> int:
        return self.pool.free_blocks + self.prefixes.kept_blocks

    @property
    def used_tokens(self) -> int:
        return (self.pool.total_blocks - self.free_blocks) * BLOCK

    @property
    def kept_tokens(self) -> int:
        return self.prefixes.kept_blocks * BLOCK

    def fits(self, sequence: Sequence) -> bool:
        """Whether a sequence could start now and get its next token, too."""
        return _least_blocks(sequence) <= self.free_blocks

    def could_fit(self, sequence: Sequence, others: Iterable[Sequence]) -> bool:
        """The same once the ``others`` have given way."""
        return _least_blocks(sequence) <= self.free_blocks + sum(each.cache.blocks for each in others if each.cache)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence that fits its cache, with as much in it as others have computed."""
        match = self.prefixes.find(sequence.key, sequence.most_reused)
        sequence.reusable = True
        reused = None if match is None else self._reuse(sequence, match)
        sequence.cache = reused or self._allocate(sequence)
        sequence.computed = match.tokens if match is not None and reused else 0
        # What had to give way and finds what it had computed itself is no hit.
        if self.prefixes.enabled and sequence.arrived is not None:
            self._queries += len(sequence.tokens)
            self._hits += sequence.computed

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pay for ``tokens`` positions in all; False, with nothing changed, when there is no room."""
        assert sequence.cache is not None
        return self._reserve(blocks_for(tokens) - sequence.cache.blocks) and self.pool.grow(sequence.cache, tokens)

    def publish(self, sequence: Sequence) -> None:
        """Let others copy what the sequence has computed of the tokens that it began with."""
        key = sequence.key[: sequence.computed * TOKEN_BYTES]
        if sequence.reusable and sequence.cache is not None and len(key) != sequence.published:
            sequence.entry = self.prefixes.publish(sequence.entry, key, sequence.cache)
            sequence.published = len(key)

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take back a sequence's cache, to keep what it has computed as long as there is room."""
        if sequence.cache is None:
            return
        if keep and sequence.reusable:
            key = token_key(sequence.tokens[: sequence.computed])
            self.prefixes.keep(sequence.entry, key, sequence.cache)
        else:
            self.prefixes.withdraw(sequence.entry)
            self.pool.free(sequence.cache)
        sequence.cache, sequence.entry, sequence.published = None, None, 0

    def distrust(self, sequence: Sequence) -> None:
        """Nobody else is to reuse what this one computes."""
        self.prefixes.withdraw(sequence.entry)
        sequence.entry, sequence.reusable = None, False

    def forget(self, running: Iterable[Sequence]) -> None:
        """Reuse nothing that was computed up to now."""
        for sequence in running:
            self.distrust(sequence)
        self.prefixes.clear()

    def take_queries(self) -> tuple[int, int]:
        """Prompt tokens looked for since the last call, and how many were found."""
        counts, self._queries, self._hits = (self._queries, self._hits), 0, 0
        return counts

    def _reuse(self, sequence: Sequence, match: Match) -> Cache | None:
        """A cache with the match's tokens in it: the entry's own where nobody else needs it, else a copy.

        None where there is room for one of the two only, and the entry's address space does not do.
        """
        source = match.entry.cache
        own = source.blocks if match.kept else 0
        fits_beside = blocks_for(len(sequence.tokens)) + own <= self.free_blocks
        if match.kept and source.capacity >= sequence.capacity and (match.whole or not fits_beside):
            sequence.entry = self.prefixes.take(match.entry, match.tokens)
            self._reserve(blocks_for(len(sequence.tokens)) - source.blocks)
            self.pool.grow(source, len(sequence.tokens))
            return source
        if not fits_beside:
            return None
        if match.kept:
            self.prefixes.touch(match.entry)
        cache = self._allocate(sequence)
        self.pool.copy(source, cache, match.tokens)
        if match.kept and match.whole and match.tokens == match.entry.tokens:  # the copy has all of it
            self.prefixes.drop(match.entry)
        return cache

    def _allocate(self, sequence: Sequence) -> Cache:
        self._reserve(blocks_for(len(sequence.tokens)))
        return self.pool.allocate(len(sequence.tokens), sequence.capacity)

    def _reserve(self, blocks: int) -> bool:
        """Make that many blocks free in the pool; False when not even eviction can."""
        short = blocks - self.pool.free_blocks
        if short > self.prefixes.kept_blocks:
            return False
        if short > 0:
            self.prefixes.evict(short)
        return True


def _least_blocks(sequence: Sequence) -> int:
    return blocks_for(min(len(sequence.tokens) + 1, sequence.capacity))
