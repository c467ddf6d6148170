"""Rows to int8 on a device, to the bits of consilium.quantization. Letters: T rows, D their size."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arithmetic import magnitude, quantize, scale_of
from consilium.gpu.jit import EXACT, jit, power_of_two
from consilium.quantization import Quantized

MOST_AT_ONCE = 4096  # elements of a row that one program has in registers


@jit
def _quantize_rows(x: tl.tensor, values: tl.tensor, scales: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Row program_id(0) of x [T, SIZE]: its values int8 [SIZE] and its scale."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    x += row * SIZE
    values += row * SIZE
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SIZE, BLOCK):
        part = tl.load(x + start + place, mask=start + place < SIZE, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(part))
    scale = scale_of(tl.max(largest, axis=0))
    for start in range(0, SIZE, BLOCK):
        part = tl.load(x + start + place, mask=start + place < SIZE, other=0.0).to(tl.float32)
        tl.store(values + start + place, quantize(part, scale), mask=start + place < SIZE)
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor) -> Quantized:
    """Rows x [T, D], float32 or bfloat16, contiguous, every one by itself."""
    rows, size = x.shape
    values = torch.empty(rows, size, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        _quantize_rows[(rows,)](x, values, scales, size, min(power_of_two(size), MOST_AT_ONCE), **EXACT)
    return Quantized(values, scales)
