"""W8A16 (`int8-weight-only`): int8 weights with float activations, for models whose activations quantize badly.

    y[m, n] = (sum over k of x[m, k] · float32(q_w[n, k])) · scale_w[n]

The sum is float32's, whatever the rows' dtype; int8 values are exact in it, so the weights lose nothing beyond their
rounding to int8. The order is torch's, hence the products run in tiles of equal size (consilium.float_experts), and a
row's bits depend on no other row. Weights take a quarter of float32's memory, and are widened once for each call: a
call of few rows costs more time than in `int8`. Letters: P (token, expert) pairs, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.checkpoint import ExpertTensors
from consilium.experts import ExpertWeights
from consilium.float_experts import float_class, one_by_one, tiled_linear
from consilium.int8_experts import prepare_int8
from consilium.matrix import Prepared
from consilium.quantization import Quantized


class WeightOnlyArithmetic:
    """Experts in int8, rows and everything between the products in floats."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.row_dtype = dtype
        self.reply_dtype = dtype
        self.numerics_class = float_class(f"int8-weight-only-{str(dtype).removeprefix('torch.')}")

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        return prepare_int8(tensors)

    def compute(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        if scales is not None:
            raise TypeError("only int8 rows come with scales")
        return one_by_one(self._compute, experts, offsets, rows if indices is None else rows[indices], out)

    def _compute(self, expert: ExpertWeights, rows: Tensor) -> Tensor:
        x = rows.float()  # [N, D]
        hidden = expert.between(_multiply(x, expert.gate), _multiply(x, expert.up))  # [N, F]
        return expert.finish(_multiply(hidden, expert.down)).to(self.reply_dtype)  # [N, D]


def _multiply(x: Tensor, weight: Prepared) -> Tensor:
    """x [N, K] float32 times the transpose of an int8 weight [M, K]: float32 [N, M]."""
    if not isinstance(weight, Quantized):
        raise TypeError("these weights were not prepared for int8")
    return tiled_linear(x, weight.values.float()) * weight.scales
