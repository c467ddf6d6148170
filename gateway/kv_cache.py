"""Keys and values: contiguous tensors per sequence, and the accounting that bounds them all.

Gathering pages would copy the cache at every step on a CPU. A sequence's tensors instead have room for its longest
possible length from the start; the system commits its memory page by page as positions are written, and the pool
counts those in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from consilium.errors import ConfigError
from consilium.model_config import ModelConfig
from consilium.units import format_size
from gateway.pages import lazy_tensor, release_tails

BLOCK = 16  # positions: the unit of the accounting, and of the keys' layout


class Cache(Protocol):
    """Keys and values of one sequence, wherever they lie."""

    @property
    def blocks(self) -> int:
        """Blocks that are paid for."""
        ...

    @property
    def capacity(self) -> int:
        """Positions it may grow to."""
        ...


class Pool(Protocol):
    """Hands out caches within a memory budget; a ``cache`` that it is given is one of its own."""

    @property
    def total_blocks(self) -> int: ...

    @property
    def free_blocks(self) -> int: ...

    @property
    def total_tokens(self) -> int: ...

    def allocate(self, tokens: int, capacity: int) -> Cache:
        """A cache with ``tokens`` positions paid for, which may grow to ``capacity``."""
        ...

    def grow(self, cache: Any, tokens: int) -> bool:
        """Pay for ``tokens`` positions in all; False, with nothing changed, when there is no room."""
        ...

    def trim(self, cache: Any, tokens: int) -> None:
        """Take back the positions from ``tokens`` on."""
        ...

    def free(self, cache: Any) -> None:
        """Take back everything a cache was given."""
        ...

    def copy(self, source: Any, target: Any, tokens: int) -> None:
        """Copy the first ``tokens`` positions."""
        ...


@dataclass(slots=True)
class KVCache:
    """Keys and values of one sequence, of which ``blocks`` are paid for; contiguous, committed as they are written."""

    keys: Tensor  # [L, Hkv, blocks, d, BLOCK]: a query's products with the keys of one block lie side by side
    values: Tensor  # [L, Hkv, blocks * BLOCK, dv]
    blocks: int

    @property
    def committed(self) -> int:
        """Positions that may be written."""
        return self.blocks * BLOCK

    @property
    def capacity(self) -> int:
        """Positions there is address space for."""
        return self.values.shape[2]


class KVPool:
    """Hands out caches within a memory budget."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, memory: int) -> None:
        self._shape = (config.num_layers, config.num_kv_heads)
        self._key_size, self._value_size = config.head_dim, config.value_size
        self._dtype = dtype
        bytes_per_token = config.cached_elements * dtype.itemsize
        self.total_blocks = memory // (bytes_per_token * BLOCK)
        self.free_blocks = self.total_blocks
        if not self.total_blocks:
            needed = format_size(bytes_per_token * BLOCK)
            raise ConfigError(f"gateway.kv_cache_memory: one block of {BLOCK} tokens takes {needed}; allow more")

    @property
    def total_tokens(self) -> int:
        return self.total_blocks * BLOCK

    def allocate(self, tokens: int, capacity: int) -> KVCache:
        """A cache with ``tokens`` positions paid for and address space for ``capacity``."""
        blocks, room = blocks_for(tokens), blocks_for(capacity)
        self.free_blocks -= blocks
        keys = lazy_tensor((*self._shape, room, self._key_size, BLOCK), self._dtype)
        values = lazy_tensor((*self._shape, room * BLOCK, self._value_size), self._dtype)
        return KVCache(keys, values, blocks)

    def grow(self, cache: KVCache, tokens: int) -> bool:
        """Pay for ``tokens`` positions in all; False, with nothing changed, when there is no room."""
        more = blocks_for(tokens) - cache.blocks
        if more > self.free_blocks:
            return False
        if more > 0:
            cache.blocks += more
            self.free_blocks -= more
        return True

    def trim(self, cache: KVCache, tokens: int) -> None:
        """Take back the positions from ``tokens`` on, and give their memory to the system."""
        blocks = blocks_for(tokens)
        if blocks < cache.blocks:
            for tensor, size in ((cache.keys, self._key_size), (cache.values, self._value_size)):
                release_tails(tensor.view(-1, tensor[0, 0].numel()), blocks * BLOCK * size)
            self.free_blocks += cache.blocks - blocks
            cache.blocks = blocks

    def free(self, cache: KVCache) -> None:
        """Take back everything a cache was given."""
        self.free_blocks += cache.blocks
        cache.blocks = 0

    def copy(self, source: KVCache, target: KVCache, tokens: int) -> None:
        """Copy the first ``tokens`` positions."""
        copy_positions(source, target, tokens)


def blocks_for(tokens: int) -> int:
    """Blocks that hold ``tokens`` positions."""
    return -(-tokens // BLOCK)


def copy_positions(source: KVCache, target: KVCache, tokens: int) -> None:
    """Copy the first ``tokens`` positions; those of the last block that lie beyond are written before they are read."""
    blocks = blocks_for(tokens)
    target.keys[:, :, :blocks] = source.keys[:, :, :blocks]
    target.values[:, :, :tokens] = source.values[:, :, :tokens]
