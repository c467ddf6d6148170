"""Keys and values in pages of one tensor on the device (Kwon et al. 2023, "PagedAttention"), and who has which page.

The accounting is that of gateway.kv_cache.KVPool: one block of it is one page. The first page is nobody's: rows that
fill up a step to the size of a graph write there.
Letters: L layers, Hkv key-value heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.errors import ConfigError
from consilium.model_config import ModelConfig
from consilium.units import format_size
from gateway.kv_cache import BLOCK, blocks_for

PAGE = BLOCK  # positions
NOBODYS = 0


class LayerPages(NamedTuple):
    """The pages of one layer, [pages, Hkv, PAGE, d] each."""

    keys: Tensor
    values: Tensor


@dataclass(slots=True, eq=False)
class PagedCache:
    """The pages of one sequence, in the order of its positions."""

    pages: NDArray[np.int32]  # room for all that it may get; the first ``blocks`` are its own
    blocks: int = field(default=0)

    @property
    def committed(self) -> int:
        """Positions that may be written."""
        return self.blocks * PAGE

    @property
    def capacity(self) -> int:
        """Positions it may grow to."""
        return len(self.pages) * PAGE

    def slots(self, first: int, count: int) -> NDArray[np.int32]:
        """Where ``count`` positions from ``first`` on lie: page · PAGE + place in it."""
        positions = np.arange(first, first + count, dtype=np.int32)
        slots: NDArray[np.int32] = self.pages[positions // PAGE] * PAGE + positions % PAGE
        return slots


class PagePool:
    """Hands out pages within a memory budget."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, memory: int, device: torch.device) -> None:
        page_bytes = config.cached_elements * dtype.itemsize * PAGE
        self.total_blocks = memory // page_bytes - 1
        if self.total_blocks < 1:
            raise ConfigError(
                f"gateway.kv_cache_device_memory: pages of {PAGE} tokens take {format_size(page_bytes)}, two are the "
                "least; allow more"
            )
        shape = (config.num_layers, self.total_blocks + 1, config.num_kv_heads, PAGE, config.head_dim)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._free = list(range(self.total_blocks, NOBODYS, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def total_tokens(self) -> int:
        return self.total_blocks * PAGE

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._keys.dtype

    def layer(self, layer: int) -> LayerPages:
        """The pages of one layer."""
        return LayerPages(self._keys[layer], self._values[layer])

    def allocate(self, tokens: int, capacity: int) -> PagedCache:
        """A cache with ``tokens`` positions paid for, which may grow to ``capacity``."""
        cache = PagedCache(np.full(blocks_for(capacity), NOBODYS, np.int32))
        self._take(cache, blocks_for(tokens))
        return cache

    def grow(self, cache: PagedCache, tokens: int) -> bool:
        """Pay for ``tokens`` positions in all; False, with nothing changed, when there is no room."""
        blocks = blocks_for(tokens)
        if blocks - cache.blocks > self.free_blocks:
            return False
        self._take(cache, blocks)
        return True

    def trim(self, cache: PagedCache, tokens: int) -> None:
        """Take back the pages from position ``tokens`` on."""
        blocks = blocks_for(tokens)
        if blocks < cache.blocks:
            self._free += cache.pages[blocks : cache.blocks].tolist()
            cache.blocks = blocks

    def free(self, cache: PagedCache) -> None:
        """Take back everything a cache was given."""
        self.trim(cache, 0)

    def copy(self, source: PagedCache, target: PagedCache, tokens: int) -> None:
        """Copy the first ``tokens`` positions; those of the last page beyond are written before they are read."""
        blocks = blocks_for(tokens)
        there, here = (self._index(cache.pages[:blocks]) for cache in (target, source))
        for tensor in (self._keys, self._values):
            tensor[:, there] = tensor[:, here]

    def _take(self, cache: PagedCache, blocks: int) -> None:
        if blocks > cache.blocks:
            more = blocks - cache.blocks
            cache.pages[cache.blocks : blocks] = self._free[: -more - 1 : -1]
            del self._free[-more:]
            cache.blocks = blocks

    def _index(self, pages: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(pages.astype(np.int64)).to(self._keys.device)
