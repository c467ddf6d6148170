"""A layer up to its experts in one kernel: where projections are int8 and rows are few, as in decoding.

Letters: T rows of the step, D hidden size.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, empty_like

from consilium import parallel
from consilium.integer_product import IntegerProduct
from consilium.kernels import attention_layer as kernel
from gateway.attention import Attention
from gateway.batch import Batch
from gateway.linear import Int8Linear
from gateway.norm import RMSNorm


class FusedAttention:
    """The norm before attention, attention, the residual stream, and the norm after: bits as from one after the other.

    After every layer's weights no cache holds Python's code any more, and each thread woken costs some 50 µs.
    """

    def __init__(self, before: RMSNorm, attention: Attention, after: RMSNorm, product: IntegerProduct) -> None:
        qkv, out = attention.projections
        if not isinstance(qkv, Int8Linear) or not isinstance(out, Int8Linear):
            raise TypeError("where there is an integer product, projections are int8")
        self._attention, self._product = attention, product
        self._alive = before, qkv, out, after  # whose tensors the addresses are of
        heads = attention.heads
        weights = before.address, *qkv.addresses, *heads.addresses, *out.addresses, after.address
        sizes = attention.hidden_size, *heads.shape, heads.layer, heads.window
        self._layer = np.array([*weights, *sizes], np.int64)
        self.weight_bytes = qkv.weight_bytes + out.weight_bytes

    def takes(self, rows: int) -> bool:
        """Whether so many rows are few enough."""
        return not self._product.takes_many(rows)

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x [T, D] float32 -> the residual stream and its norm, both [T, D]; writes keys and values into the caches."""
        heads, rows = self._attention.heads, len(x)
        parts = parallel.count_slices(self.weight_bytes + heads.work(batch))
        scratch_row = 4 * batch.positions
        size = kernel.workspace_bytes(rows, self._attention.hidden_size, *heads.shape[:4])
        workspace = batch.workspace(size + parts * heads.scratch_rows * scratch_row)
        y, normed = empty_like(x), empty_like(x)
        sequences = batch.table.ctypes.data, len(batch.segments)
        addresses = x.data_ptr(), rows, batch.cos.data_ptr(), batch.sin.data_ptr(), *sequences
        step = np.array([*addresses, scratch_row, workspace.data_ptr(), y.data_ptr(), normed.data_ptr()], np.int64)
        layer, form = self._layer.ctypes.data, batch.form

        def work(sharer: parallel.Sharer) -> None:
            kernel.compute(self._product.kind, form, heads.epsilon, layer, step.ctypes.data, sharer)

        parallel.share(work, kernel.PHASES, parts)
        return y, normed
