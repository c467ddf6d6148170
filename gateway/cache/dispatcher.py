"""The cache before the dispatcher: what is known is filled in, only the rest is sent to workers, and then kept.

An entry is one token's row at one layer with the outputs of all its experts. An entry for each of the experts would be
found in the same cases, as the row decides its experts, and cost K times the keys, lookups and commands.

Letters: T tokens of the step, D hidden size, K experts per token, n rows among them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.config import CacheConfig
from consilium.errors import ConfigError
from consilium.model_config import ModelConfig
from gateway.batches import ExpertBatches, ExpertOutputs, keep_tokens
from gateway.cache.keys import RowKeys, redis_names
from gateway.cache.memory import MemoryCache
from gateway.cache.meter import CacheMeter
from gateway.cache.remote import RemoteCache
from gateway.cache.value import RowCodec
from gateway.mailbox import Mailbox
from gateway.messages import CacheStats
from gateway.placement import ExpertIdentity
from gateway.worker import ExpertSource

log = logging.getLogger(__name__)


def make_cache(
    config: CacheConfig, inner: ExpertSource, dtype: torch.dtype, model: ModelConfig, mailbox: Mailbox
) -> CachedDispatcher:
    """The configured cache before ``inner``. Raises ConfigError where it keeps nothing, or the URL cannot be used."""
    if config.redis is None and not config.memory:
        raise ConfigError("cache: keeps nothing: give it `memory:` or `redis:`, or leave `cache:` out")
    salt, meter = config.salt.get_secret_value(), CacheMeter()
    memory = MemoryCache(config.memory, dtype, model.top_k, model.hidden_size)
    remote = None
    if config.redis is not None:
        codec = RowCodec(dtype, model.top_k, model.hidden_size, salt)
        remote = RemoteCache(config, config.redis.get_secret_value(), codec, mailbox, meter)
    return CachedDispatcher(inner, memory, remote, meter, dtype, salt)


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

    def forget(self) -> None:
        """A worker answered with wrong numbers: use nothing of what is kept here."""
        self._memory.clear()
        if self.remote is not None:
            log.error("the Redis of the cache may hold rows of a worker that lied: delete them, or change cache.salt")

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """As the dispatcher's; failed rows are not kept."""
        makes_keys, started = self._keys, time.perf_counter()
        keys = makes_keys.of_rows(layer, batches)
        found, rows = self._memory.find(keys)  # [n, K, D]
        self._meter.looked_up("memory", len(found), len(keys) - len(found), time.perf_counter() - started)
        if len(found) == len(keys):
            outputs = ExpertOutputs(batches.places, rows.shape[2], self._dtype)
            _place(outputs, found, rows)
            return outputs, {}
        missing = {row: keys[row] for row in range(len(keys))}
        for row in found:
            del missing[row]
        if self.remote is not None:
            shared, shared_rows = await self._fetch(self.remote, layer, missing)
            for row in shared:
                del missing[row]
            found, rows = found + shared, torch.cat([rows, shared_rows])
        rest = keep_tokens(batches, list(missing)) if found else batches
        outputs, failures = await self._inner.dispatch(layer, rest)
        if self._keys is makes_keys:  # else other weights may have come meanwhile, and computed some of these rows
            good = missing.keys() - failures.keys() - outputs.stood_in
            self._keep(layer, {row: key for row, key in missing.items() if row in good}, outputs)
        _place(outputs, found, rows)
        return outputs, failures

    def due_in(self) -> float | None:
        """Seconds until there is something to report; None while there is nothing."""
        return self._meter.due_in()

    def take_report(self) -> CacheStats | None:
        """What the cache did since the last report, and its state, if that is due."""
        stats = self._meter.take()
        if stats is not None:
            memory = self._memory
            stats.entries, stats.bytes, stats.capacity = len(memory), memory.size, memory.capacity
            stats.evictions = memory.evictions - self._evictions_reported
            self._evictions_reported = memory.evictions
            if self.remote is not None:
                stats.breakers = {name: breaker.state for name, breaker in self.remote.breakers.items()}
        return stats

    async def _fetch(
        self, remote: RemoteCache, layer: int, missing: Mapping[int, bytes | None]
    ) -> tuple[list[int], Tensor]:
        """Which of the ``missing`` rows Redis holds, and the rows [n, K, D]; they are now in memory, too."""
        started = time.perf_counter()
        wanted = {row: key for row, key in missing.items() if key is not None}
        values = await remote.fetch(redis_names(layer, list(wanted.values()))) if wanted else []
        found = {row: value for row, value in zip(wanted, values, strict=True) if value is not None}
        rows = self._decode(list(found.values()))
        self._memory.put([wanted[row] for row in found], rows)
        self._meter.looked_up("redis", len(found), len(missing) - len(found), time.perf_counter() - started)
        return list(found), rows

    def _keep(self, layer: int, computed: Mapping[int, bytes | None], outputs: ExpertOutputs) -> None:
        """Keep the ``outputs`` of these rows under their keys."""
        kept = {row: key for row, key in computed.items() if key is not None}
        if kept:
            top_k = self._memory.find(())[1].shape[1]
            rows = outputs.rows(_slots(list(kept), top_k)).view(len(kept), top_k, -1)  # [n, K, D]
            keys = list(kept.values())
            self._memory.put(keys, rows)
            if self.remote is not None:
                self.remote.store(redis_names(layer, keys), rows.view(torch.uint8).numpy().tobytes())

    def _decode(self, values: Sequence[memoryview]) -> Tensor:
        """[n, K, D]."""
        empty = self._memory.find(())[1]
        if not values:
            return empty
        content = torch.frombuffer(bytearray(b"".join(values)), dtype=self._dtype)
        return content.view(len(values), *empty.shape[1:])


def _slots(tokens: Sequence[int], top_k: int) -> NDArray[np.int64]:
    """The places of all outputs of these tokens [n * K]."""
    return (np.array(tokens, np.int64)[:, None] * top_k + np.arange(top_k)).reshape(-1)


def _place(outputs: ExpertOutputs, tokens: Sequence[int], rows: Tensor) -> None:
    """Rows [n, K, D] are those of ``tokens`` [n]."""
    outputs.place(rows.reshape(-1, rows.shape[2]), _slots(tokens, rows.shape[1]))
