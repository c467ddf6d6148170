"""W8A8: int8 weights and int8 activations, exact by construction. This is the one definition of it.

Rows of activations and rows (output channels) of weights are quantized the same way, each by itself, in float32:
    scale = max|x| / 127                                one IEEE division
    q     = round_half_even(x / scale)                  one IEEE division an element; |q| <= 127
A product of quantized x [M, K] and w [N, K] is
    a[m, n] = sum over k of q_x[m, k] · q_w[n, k]       exact integers, so no order or batch can change them
    y[m, n] = (float32(a[m, n]) · scale_x[m]) · scale_w[n]      rounded to nearest even at each of the three steps
Nothing here depends on other rows: a row gives the same bits alone, in any batch, and on every worker.

A row that is all zeros, or so small that its scale would be subnormal (some hardware flushes those), has scale 0.
A row that holds an infinity or a NaN gets the scale NaN: it yields NaNs, and only in its own outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from consilium.errors import CheckpointError

LEVELS = 127
# int32 holds the sum of this many products of 128 · 128.
MAX_SUMMED = (2**31 - 1) // 128**2
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Quantized(NamedTuple):
    """int8 rows with one scale each: row i stands for values[i] · scales[i]."""

    values: Tensor  # [T, D] int8
    scales: Tensor  # [T] float32


def quantize_rows(x: Tensor) -> Quantized:
    """Quantize activations x [T, D] of any float dtype, every row by itself."""
    x = x.float()  # [T, D]
    if x.numel() == 0:
        return Quantized(x.to(torch.int8), x.new_zeros(x.shape[0]))
    levels = x.new_full((), LEVELS)  # a tensor, since torch divides by a Python number with its inverse on GPUs
    scales = x.abs().amax(dim=1) / levels  # [T]
    smallest, largest = torch.aminmax(scales)  # NaN when any is
    if smallest < _SMALLEST_SCALE or not largest < torch.inf:
        return _quantize_odd_rows(x, scales)
    return Quantized((x / scales[:, None]).round_().to(torch.int8), scales)


def _quantize_odd_rows(x: Tensor, scales: Tensor) -> Quantized:
    """The same where some rows are zero, tiny or not finite: their values become zeros, their scales 0 or NaN."""
    tiny = scales < _SMALLEST_SCALE  # [T]
    usable = ~tiny & (scales < torch.inf)  # [T] False for NaN too
    rows = torch.where(usable[:, None], x, 0.0) / torch.where(usable, scales, 1.0)[:, None]  # [T, D]
    return Quantized(rows.round_().to(torch.int8), torch.where(usable, scales, torch.where(tiny, 0.0, torch.nan)))


def quantize_weight(w: Tensor) -> Quantized:
    """Quantize a weight matrix w [N, K] per output channel. Raises CheckpointError for a row too long for int32."""
    if w.shape[1] > MAX_SUMMED:
        raise CheckpointError(f"rows of {w.shape[1]} weights are too long for int8 (at most {MAX_SUMMED})")
    return quantize_rows(w.contiguous())  # kernels read it by its address
