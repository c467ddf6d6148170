"""Rows of the residual stream made ready for int8 products: RMS norm, SiLU between products, and quantizing.

One program a row, so what else is in the batch changes no bit. Letters: T rows, D hidden size, F FFN size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arithmetic import magnitude, quantize, scale_of, silu_and_multiply
from consilium.gpu.jit import EXACT, jit, power_of_two
from consilium.quantization import Quantized


def new_rows(rows: int, size: int, device: torch.device) -> Quantized:
    """Room for int8 rows [T, D] and their scales."""
    values = torch.empty(rows, size, dtype=torch.int8, device=device)
    return Quantized(values, torch.empty(rows, device=device))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, out: Quantized, normed: Tensor | None = None) -> None:
    """The norm of x [T, D] float32 as int8 rows, and as floats in ``normed`` [T, D] where they are needed."""
    rows, size = x.shape
    floats = x if normed is None else normed
    sizes = {"SIZE": size, "BLOCK": power_of_two(size), "KEEP": normed is not None}
    _rms_norm[(rows,)](x, weight, epsilon, out.values, out.scales, floats, **sizes, **_warps(size), **EXACT)


def activate(gate_up: Tensor, out: Quantized) -> None:
    """SiLU(gate) · up as int8 rows [T, F], from gate and up side by side, [T, 2 F] float32."""
    rows, size = out.values.shape
    sizes = {"SIZE": size, "BLOCK": power_of_two(size)}
    _activate[(rows,)](gate_up, out.values, out.scales, **sizes, **_warps(size), **EXACT)


def _warps(size: int) -> dict[str, Any]:
    return {"num_warps": 4 if size <= 4096 else 8}


@jit
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    epsilon: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    normed: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < SIZE
    own = tl.load(x + row * SIZE + place, mask=inside, other=0.0)  # [D]
    y = normalize(own, tl.load(weight + place, mask=inside, other=0.0), epsilon, SIZE)
    if KEEP:
        tl.store(normed + row * SIZE + place, y, mask=inside)
    store_quantized(y, inside, place, row, values, scales, SIZE)


@jit
def normalize(x: tl.tensor, weight: tl.tensor, epsilon: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """RMS norm of one row; what is beyond SIZE is zero."""
    mean = tl.math.div_rn(tl.sum(x * x, axis=0), tl.full((), SIZE, tl.float32))
    factor = tl.math.div_rn(tl.full((), 1.0, tl.float32), tl.math.sqrt_rn(mean + epsilon))
    return x * factor * weight


@jit
def store_quantized(
    x: tl.tensor,
    inside: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Quantize one row, of which the elements ``inside`` are stored at their ``place``s."""
    scale = scale_of(tl.max(magnitude(x), axis=0))
    tl.store(scales + row, scale)
    tl.store(values + row * SIZE + place, quantize(x, scale), mask=inside)


@jit
def _activate(
    gate_up: tl.tensor, values: tl.tensor, scales: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + place, mask=inside, other=0.0)  # [F]
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + place, mask=inside, other=0.0)
    store_quantized(silu_and_multiply(gate, up), inside, place, row, values, scales, SIZE)
