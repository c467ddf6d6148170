"""Grouped-query attention (Ainslie et al. 2023) over the contiguous cache of each sequence.

Letters: T rows of the step, D hidden size, H query heads, Hkv key-value heads, d head size, S positions seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import Checkpoint
from consilium.kernels import attention as kernel
from consilium.kernels.float_tile import BFLOAT16, FLOAT32, Form
from gateway.kv_cache import BLOCK, KVCache, blocks_for
from gateway.linear import LinearMaker

# For parallel, which counts bytes of weights: norms and rotations cost as much as so many products for each element,
# and a thread makes so many products of attention while it reads a byte of weights.
PREPARING, PRODUCTS_PER_BYTE = 32, 2


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one step that belong to one sequence."""

    cache: KVCache
    row: int  # first row in the step
    length: int
    position: int  # of the first row in its sequence

    @property
    def rows(self) -> range:
        """Its rows in the step."""
        return range(self.row, self.row + self.length)

    def numbers(self) -> list[int]:
        """What the kernel is told of it: see consilium.kernels.attention.attend."""
        keys, values = self.cache.keys, self.cache.values
        strides = [tensor.stride(axis) * tensor.itemsize for axis in (0, 1) for tensor in (keys, values)]
        return [keys.data_ptr(), values.data_ptr(), *strides, self.row, self.length, self.position]


@dataclass(slots=True)
class Batch:
    """The rows of one step: T token ids with their positions, and whose they are."""

    tokens: Tensor  # [T]
    segments: list[Segment]
    cos: Tensor  # [T, d/2] float32
    sin: Tensor  # [T, d/2] float32
    failures: dict[int, Exception] = field(default_factory=dict)  # row to why it has no valid result
    stood_in: dict[int, int] = field(default_factory=dict)  # row to layers in which nobody held one of its experts
    table: NDArray[np.int64] = field(init=False)  # the segments' numbers
    positions: int = field(init=False)  # of the longest sequence, in whole blocks
    _workspace: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.table = np.array([segment.numbers() for segment in self.segments], np.int64)
        self.positions = BLOCK * max((blocks_for(each.position + each.length) for each in self.segments), default=0)

    @property
    def form(self) -> Form:
        """What the caches are made of, for kernels."""
        return BFLOAT16 if self.segments[0].cache.keys.dtype is torch.bfloat16 else FLOAT32

    def workspace(self, size: int) -> Tensor:
        """At least ``size`` bytes that a layer may use until it ends: the same for all layers, so still in a cache."""
        if self._workspace is None or self._workspace.nbytes < size:
            self._workspace = torch.empty(size, dtype=torch.int8)
        return self._workspace

    @property
    def prefill(self) -> bool:
        """Whether some of the rows are of prompts."""
        return len(self.tokens) > len(self.segments)

    def live_rows(self) -> Sequence[int]:
        """The rows that somebody still waits for: of sequences without a failed row."""
        if not self.failures:
            return range(len(self.tokens))
        spans = [each.rows for each in self.segments]
        return [row for span in spans if self.failures.keys().isdisjoint(span) for row in span]


class Attention:
    """Queries, keys and values of one layer, and the output projection."""

    def __init__(self, checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> None:
        config, names = checkpoint.config, checkpoint.names
        self.layer, self.hidden_size, self.epsilon = layer, config.hidden_size, np.float32(config.rms_norm_eps)
        self.shape = config.num_heads, config.num_kv_heads, config.head_dim  # H, Hkv, d
        self.window = (config.sliding_windows[layer] or 0) if config.sliding_windows else 0
        inner, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes = {names.q_proj: inner, names.k_proj: kv, names.v_proj: kv}

        def name(template: str) -> str:
            return template.format(layer=layer)

        def biases(sizes: dict[str, int]) -> list[Tensor]:
            if not config.attention_bias:
                return []
            return [checkpoint.tensor(f"{name(each)}.bias", (size,)) for each, size in sizes.items()]

        # One product for queries, keys and values: [(H + 2 Hkv) d, D].
        matrices = [
            checkpoint.matrix(f"{name(each)}.weight", (size, config.hidden_size)) for each, size in sizes.items()
        ]
        qkv = maker.make(matrices, biases(sizes))
        out = checkpoint.matrix(f"{name(names.o_proj)}.weight", (config.hidden_size, inner))
        self.projections = qkv, maker.make([out], biases({names.o_proj: config.hidden_size}))
        self._norms = [
            checkpoint.tensor(name(each), (config.head_dim,)).to(torch.float32, copy=True)
            for each in ((names.q_norm, names.k_norm) if config.qk_norm else ())
        ]
        self.norm_addresses = [norm.data_ptr() for norm in self._norms] or [0, 0]

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """[T, D] -> [T, D]; writes this step's keys and values into the caches."""
        qkv, out = self.projections
        return out.forward(self._attend(qkv.forward(x).float().contiguous(), batch).to(x.dtype))

    def work(self, batch: Batch) -> int:
        """What attention itself costs, in bytes of weights that take as long to read."""
        heads, _, size = self.shape
        # Every query and key is turned and, with all keys seen, multiplied: about so many products.
        return len(batch.tokens) * heads * size * (PREPARING + 2 * batch.positions) // PRODUCTS_PER_BYTE

    @property
    def scratch_rows(self) -> int:
        """Rows of scores that a thread needs room for."""
        heads, kv_heads, _ = self.shape
        return max(kernel.BLOCK, heads // kv_heads)

    def _attend(self, qkv: Tensor, batch: Batch) -> Tensor:
        """[T, (H + 2 Hkv) d] -> [T, H d]."""
        heads, _, size = self.shape
        out = torch.empty(len(qkv), heads * size)
        parts = parallel.count_slices(self.work(batch))
        scratch = torch.empty(parts, self.scratch_rows, batch.positions)
        norms = np.array(self.norm_addresses, np.int64)

        def work(sharer: parallel.Sharer) -> None:
            turns = batch.cos.data_ptr(), batch.sin.data_ptr()
            sequences = batch.table.ctypes.data, len(batch.segments), self.layer, self.window
            places = scratch.data_ptr(), 4 * batch.positions, out.data_ptr()
            norm = norms.ctypes.data, self.epsilon
            kernel.attend(batch.form, qkv.data_ptr(), *self.shape, *norm, *turns, *sequences, *places, sharer)

        parallel.share(work, 1, parts)
        return out
