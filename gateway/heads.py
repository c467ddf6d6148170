"""Attention's own part: from queries, keys and values to the heads' outputs, over the caches of a step's sequences.

Letters: T rows of the step, H query heads, Hkv key-value heads, d head size, dv that of values, r rotated elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilium import parallel
from consilium.kernels import attention as kernel
from consilium.model_config import ModelConfig
from gateway.batch import Batch

# For parallel, which counts bytes of weights: norms and rotations cost as much as so many products for each element,
# and a thread makes so many products of attention while it reads a byte of weights.
PREPARING, PRODUCTS_PER_BYTE = 32, 2


class Heads:
    """The heads of one layer."""

    def __init__(
        self, config: ModelConfig, layer: int, norms: Sequence[Tensor] = (), sinks: Tensor | None = None
    ) -> None:
        """``norms`` are the weights [d] for queries and keys, or none; ``sinks`` [H]; all float32."""
        self.layer, self.epsilon = layer, np.float32(config.rms_norm_eps)
        self.shape = config.num_heads, config.num_kv_heads, config.head_dim, config.value_size, config.rotated_size
        self.window = (config.sliding_windows[layer] or 0) if config.sliding_windows else 0
        self._alive = *norms, sinks
        # As the kernel is told them: of the norms and the sinks, 0 for none.
        self.addresses = [norm.data_ptr() for norm in norms] or [0, 0]
        self.addresses.append(0 if sinks is None else sinks.data_ptr())

    @property
    def scratch_rows(self) -> int:
        """Rows of scores that a thread needs room for."""
        return max(kernel.BLOCK, self.shape[0] // self.shape[1])

    def work(self, batch: Batch) -> int:
        """What attention costs, in bytes of weights that take as long to read."""
        heads, _, size, value_size, _ = self.shape
        # Every query and key is turned and, with all keys seen, multiplied: about so many products.
        products = size * PREPARING + (size + value_size) * batch.positions
        return len(batch.tokens) * heads * products // PRODUCTS_PER_BYTE

    def attend(self, qkv: Tensor, batch: Batch) -> Tensor:
        """[T, H d + Hkv d + Hkv dv] float32, which is changed -> [T, H dv]; writes keys and values into the caches."""
        out = torch.empty(len(qkv), self.shape[0] * self.shape[3])
        parts = parallel.count_slices(self.work(batch))
        scratch = torch.empty(parts, self.scratch_rows, batch.positions)
        norms = np.array(self.addresses, np.int64)

        def work(sharer: parallel.Sharer) -> None:
            turns = batch.cos.data_ptr(), batch.sin.data_ptr()
            sequences = batch.table.ctypes.data, len(batch.segments), self.layer, self.window
            places = scratch.data_ptr(), 4 * batch.positions, out.data_ptr()
            norm = norms.ctypes.data, self.epsilon
            kernel.attend(batch.form, qkv.data_ptr(), *self.shape, *norm, *turns, *sequences, *places, sharer)

        parallel.share(work, 1, parts)
        return out
