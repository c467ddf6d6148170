"""The cache before the dispatcher: what is known is filled in, only the rest is sent to workers, and then kept.

Letters: T tokens of the step, D hidden size, K experts per token, P (token, expert) pairs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from consilium.config import CacheConfig
from consilium.errors import ConfigError
from gateway.batches import ExpertBatches, keep_pairs
from gateway.cache.keys import RowKeys
from gateway.cache.memory import MemoryCache
from gateway.cache.meter import CacheMeter
from gateway.cache.remote import RemoteCache
from gateway.cache.value import RowCodec
from gateway.dispatcher import ExpertSource
from gateway.mailbox import Mailbox
from gateway.messages import CacheStats
from gateway.placement import ExpertIdentity

Found = dict[int, bytes]  # rows by their pair


def make_cache(
    config: CacheConfig, inner: ExpertSource, dtype: torch.dtype, hidden_size: int, mailbox: Mailbox
) -> CachedDispatcher:
    """The configured cache before ``inner``. Raises ConfigError where it keeps nothing, or the URL cannot be used."""
    if config.redis is None and not config.memory:
        raise ConfigError("cache: keeps nothing: give it `memory:` or `redis:`, or leave `cache:` out")
    salt, meter = config.salt.get_secret_value(), CacheMeter()
    remote = None
    if config.redis is not None:
        codec = RowCodec(dtype, hidden_size, salt)
        remote = RemoteCache(config, config.redis.get_secret_value(), codec, mailbox, meter)
    return CachedDispatcher(inner, MemoryCache(config.memory), remote, meter, dtype, salt)


class CachedDispatcher:
    """An ExpertSource that asks another one only for rows it does not know."""

    def __init__(
        self,
        inner: ExpertSource,
        memory: MemoryCache,
        remote: RemoteCache | None,
        meter: CacheMeter,
        dtype: torch.dtype,
        salt: str,
    ) -> None:
        self._inner, self._memory, self.remote, self._meter = inner, memory, remote, meter
        self._dtype, self._salt = dtype, salt
        self._evictions_reported = 0
        self._keys = RowKeys({}, str(dtype), salt)

    def set_identities(self, identities: Mapping[tuple[int, int], ExpertIdentity]) -> None:
        """What decides the bits of each expert from now on."""
        if identities != self._keys.identities:
            self._keys = RowKeys(identities, str(self._dtype), self._salt)

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[Tensor, dict[int, Exception]]:
        """As the dispatcher's; failed rows are not kept."""
        makes_keys = self._keys
        keys = makes_keys.of_pairs(layer, batches)
        found = self._recall(keys)
        if self.remote is not None:
            found |= await self._fetch(self.remote, [(p, key) for p, key in enumerate(keys) if key and p not in found])
        missing = np.ones(len(keys), dtype=np.bool_)
        missing[list(found)] = False
        outputs, failures = await self._inner.dispatch(layer, keep_pairs(batches, missing))
        if self._keys is makes_keys:  # else other weights may have come meanwhile, and computed some of these rows
            self._keep(batches, np.flatnonzero(missing), keys, outputs, failures)
        if found:
            outputs[batches.slots[list(found)]] = self._decode(list(found.values()))
        return outputs, failures

    def due_in(self) -> float | None:
        """Seconds until there is something to report; None while there is nothing."""
        return self._meter.due_in()

    def take_report(self) -> CacheStats | None:
        """What the cache did since the last report, and its state, if that is due."""
        stats = self._meter.take()
        if stats is not None:
            memory = self._memory
            stats.entries, stats.bytes, stats.capacity = len(memory), memory.bytes, memory.capacity
            stats.evictions = memory.evictions - self._evictions_reported
            self._evictions_reported = memory.evictions
            if self.remote is not None:
                stats.breakers = {name: breaker.state for name, breaker in self.remote.breakers.items()}
        return stats

    def _recall(self, keys: Sequence[bytes | None]) -> Found:
        started = time.perf_counter()
        found = {p: row for p, key in enumerate(keys) if key and (row := self._memory.get(key)) is not None}
        self._meter.looked_up("memory", len(found), len(keys) - len(found), time.perf_counter() - started)
        return found

    async def _fetch(self, remote: RemoteCache, wanted: Sequence[tuple[int, bytes]]) -> Found:
        if not wanted:
            return {}
        started = time.perf_counter()
        rows = await remote.fetch([key for _, key in wanted])
        found: Found = {}
        for (pair, key), row in zip(wanted, rows, strict=True):
            if row is not None:
                found[pair] = row
                self._memory.put(key, row)
        self._meter.looked_up("redis", len(found), len(wanted) - len(found), time.perf_counter() - started)
        return found

    def _keep(
        self,
        batches: ExpertBatches,
        pairs: np.ndarray[tuple[int], np.dtype[np.int64]],
        keys: Sequence[bytes | None],
        outputs: Tensor,
        failures: Mapping[int, Exception],
    ) -> None:
        """Keep the ``outputs`` [T * K, D] of these pairs, as far as they have keys and did not fail."""
        if not len(pairs):
            return
        kept = [p for p in pairs.tolist() if keys[p] and int(batches.tokens[p]) not in failures]
        rows = self._encode(outputs[batches.slots[kept]])
        items = [(key, row) for p, row in zip(kept, rows, strict=True) if (key := keys[p])]
        for key, row in items:
            self._memory.put(key, row)
        if self.remote is not None and items:
            self.remote.store(items)

    def _encode(self, rows: Tensor) -> list[bytes]:
        """The rows [P, D] as bytes; the way through float32 and back has changed none of them."""
        content = rows.to(self._dtype).view(torch.uint8).numpy().tobytes()
        width = rows.shape[1] * self._dtype.itemsize
        return [content[start : start + width] for start in range(0, len(content), width)]

    def _decode(self, rows: Sequence[bytes]) -> Tensor:
        """float32 [P, D]."""
        content = torch.frombuffer(bytearray(b"".join(rows)), dtype=self._dtype)
        return content.view(len(rows), -1).float()
