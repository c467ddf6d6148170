"""Grouped-query attention (Ainslie et al. 2023) over the contiguous cache of each sequence.

Letters: T rows of the step, D hidden size, H query heads, Hkv key-value heads, d head size, S positions seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.rope import apply_rope
from gateway.kv_cache import BLOCK, KVCache, blocks_for


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one step that belong to one sequence."""

    cache: KVCache
    row: int  # first row in the step
    length: int
    position: int  # of the first row in its sequence
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window; the layers of a step share them

    def mask(self, first: int, window: int | None) -> Tensor:
        """[n, S] whether each query sees the key at position first + j."""
        if window not in self.masks:
            self.masks[window] = _causal_mask(self.position, self.position + self.length, first, window)
        return self.masks[window]


@dataclass(slots=True)
class Batch:
    """The rows of one step: T token ids with their positions, and whose they are."""

    tokens: Tensor  # [T]
    segments: list[Segment]
    cos: Tensor  # [T, 1, d]
    sin: Tensor  # [T, 1, d]
    failures: dict[int, Exception] = field(default_factory=dict)  # row to why it has no valid result


class Attention:
    """Queries, keys and values of one layer, and the output projection."""

    def __init__(self, checkpoint: Checkpoint, layer: int, dtype: torch.dtype) -> None:
        config, names = checkpoint.config, checkpoint.names
        self._layer, self._heads, self._kv_heads = layer, config.num_heads, config.num_kv_heads
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        self._window = config.sliding_windows[layer] if config.sliding_windows else None
        sizes = {
            names.q_proj: self._heads * config.head_dim,
            names.k_proj: self._kv_heads * config.head_dim,
            names.v_proj: self._kv_heads * config.head_dim,
        }
        self._sizes = list(sizes.values())

        def load(name: str, *shape: int) -> Tensor:
            return checkpoint.tensor(name.format(layer=layer), shape).to(dtype)

        # One product for queries, keys and values: [H d + 2 Hkv d, D].
        self._qkv = torch.cat([load(f"{name}.weight", size, config.hidden_size) for name, size in sizes.items()])
        self._qkv_bias = None
        self._out = load(f"{names.o_proj}.weight", config.hidden_size, self._heads * config.head_dim)
        self._out_bias = None
        if config.attention_bias:
            self._qkv_bias = torch.cat([load(f"{name}.bias", size) for name, size in sizes.items()])
            self._out_bias = load(f"{names.o_proj}.bias", config.hidden_size)
        self._q_norm = load(names.q_norm, config.head_dim) if config.qk_norm else None
        self._k_norm = load(names.k_norm, config.head_dim) if config.qk_norm else None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; writes this step's keys and values into the caches."""
        q, k, v = torch.split(nn.linear(x, self._qkv, self._qkv_bias), self._sizes, dim=-1)
        q = self._prepare(q.view(len(x), self._heads, -1), self._q_norm, batch)  # [T, H, d]
        k = self._prepare(k.view(len(x), self._kv_heads, -1), self._k_norm, batch)  # [T, Hkv, d]
        v = v.view(len(x), self._kv_heads, -1)  # [T, Hkv, d]
        out = torch.empty_like(q)
        for segment in batch.segments:
            rows = slice(segment.row, segment.row + segment.length)
            out[rows] = self._attend(segment, q[rows], k[rows], v[rows])
        return nn.linear(out.flatten(1), self._out, self._out_bias)

    def _prepare(self, x: Tensor, norm: Tensor | None, batch: Batch) -> Tensor:
        if norm is not None:
            x = nn.rms_norm(x, (self._head_dim,), norm, self._eps)
        return apply_rope(x, batch.cos, batch.sin)

    def _attend(self, segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[n, H, d] queries of one sequence over all it has seen -> [n, H, d]."""
        start, stop = segment.position, segment.position + segment.length
        keys, values = segment.cache.keys[self._layer], segment.cache.values[self._layer]
        positions = torch.arange(start, stop)
        keys[:, positions // BLOCK, :, positions % BLOCK] = k
        values[:, start:stop] = v.transpose(0, 1)
        first = 0 if self._window is None else max(0, start + 1 - self._window)
        keys = keys[:, : blocks_for(stop)].transpose(2, 3).flatten(1, 2)[None, :, first:stop]  # [1, Hkv, S, d]
        values = values[None, :, first:stop]  # [1, Hkv, S, d]
        if segment.length == 1:  # the heads of one group are as good as so many query rows: nothing is expanded
            groups = q.view(1, self._kv_heads, -1, self._head_dim)  # [1, Hkv, H / Hkv, d]
            return nn.scaled_dot_product_attention(groups, keys, values).view(1, self._heads, self._head_dim)
        mask = segment.mask(first, self._window)
        queries = q.transpose(0, 1)[None]  # [1, H, n, d]
        out = nn.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)


def _causal_mask(start: int, stop: int, first: int, window: int | None) -> Tensor:
    """[n, S] whether the query at position start + i sees the key at position first + j."""
    query = torch.arange(start, stop)[:, None]
    key = torch.arange(first, stop)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
