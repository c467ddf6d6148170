"""Experts in floating point: the checkpoint's weights in float32 or bfloat16, with SiLU in float32.

Letters: P (token, expert) pairs, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from consilium.checkpoint import ExpertTensors
from consilium.experts import ARITHMETIC_VERSION, ExpertWeights, prepare_weights
from consilium.matrix import Prepared, to_floats

# Float products take other paths for few rows, so they always get this many: a row's bits then stay the same.
TILE = 32


class FloatArithmetic:
    """``none``: products in the library's own order, in tiles of one size."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.row_dtype = dtype
        self.reply_dtype = dtype
        self.numerics_class = float_class(str(dtype).removeprefix("torch."))

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        gate, up, down = tensors.floats()
        floats = tensors._replace(gate=gate, up=up, down=down)
        return prepare_weights(floats, lambda matrix: to_floats(matrix).to(self.row_dtype, copy=True))

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

    def _compute(self, weights: ExpertWeights, x: Tensor) -> Tensor:
        gate = tiled_linear(x, _float(weights.gate)).float()  # [P, F]
        up = tiled_linear(x, _float(weights.up)).float()  # [P, F]
        hidden = weights.between(gate, up).to(self.row_dtype)  # [P, F]
        return weights.finish(tiled_linear(hidden, _float(weights.down))).to(self.row_dtype)  # [P, D]


def one_by_one(
    compute: Callable[[ExpertWeights, Tensor], Tensor],
    experts: Sequence[ExpertWeights],
    offsets: Sequence[int],
    rows: Tensor,
    out: Tensor | None,
) -> Tensor:
    """Output rows [P, D], P > 0, of ``compute`` for each expert that has some of rows [P, D]; into ``out`` if given."""
    outputs = [
        compute(weights, rows[start:end])
        for weights, (start, end) in zip(experts, pairwise(offsets), strict=True)
        if start < end
    ]
    if out is not None:
        return torch.cat(outputs, out=out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def float_class(kind: str) -> str:
    """The numerics class of float products: the order of their sums is torch's own, by CPU and number of threads."""
    isa, threads = torch.backends.cpu.get_cpu_capability().replace(" ", "-").lower(), torch.get_num_threads()
    return f"{kind}/cpu/{isa}/torch-{torch.__version__}/threads-{threads}/{ARITHMETIC_VERSION}"


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], M > 0, times the transpose of weight [N, K] in tiles of equal size, the last one padded with zeros.

    Rows that are not finite yield NaNs, and stay out of the products: CPUs with AMX spread them over their tile.
    """
    finite = x.isfinite().all(dim=1)  # [M]
    if not finite.all():
        return tiled_linear(torch.where(finite[:, None], x, 0), weight).masked_fill(~finite[:, None], torch.nan)
    count = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -count % TILE))
    tiles = padded.view(-1, TILE, x.shape[1]).unbind()
    products = [functional.linear(tile, weight) for tile in tiles]
    return (products[0] if len(products) == 1 else torch.cat(products))[:count]  # [M, N]


def _float(matrix: Prepared) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise TypeError("these weights were prepared for integers")
    return matrix
