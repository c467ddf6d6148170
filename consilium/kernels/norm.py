"""RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016), with their sums in one fixed order.

total = sixteen sums of squares, of the elements with the same index mod 16, each in order; then these in order
y     = x · (1 / sqrt(total / D + epsilon)) · weight

Layer norm takes the mean away first, which is summed alike, and adds a bias last.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import ONE, ZERO
from consilium.kernels.compiler import floats, kernel
from consilium.kernels.float_tile import LANES


@kernel
def normalize(x: Any, weight: Any, epsilon: Any, out: Any) -> None:
    """One row [D]; ``out`` may be ``x``."""
    size = x.shape[0]
    lanes = np.zeros(LANES, np.float32)
    whole = size // LANES
    for block in range(whole):
        part = x[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += part[lane] * part[lane]
    for lane in range(size - whole * LANES):
        lanes[lane] += x[whole * LANES + lane] * x[whole * LANES + lane]
    total = ZERO
    for lane in range(LANES):
        total += lanes[lane]
    factor = ONE / np.sqrt(total / np.float32(size) + epsilon)
    for i in range(size):
        out[i] = x[i] * factor * weight[i]


@kernel
def rms_norm(x: int, rows: int, size: int, weight: int, epsilon: Any, out: int) -> None:
    """float32 [T, D] at ``out`` from x [T, D] and weight [D], every row by itself."""
    scale = floats(weight, size)
    for row in range(rows):
        normalize(floats(x + 4 * row * size, size), scale, epsilon, floats(out + 4 * row * size, size))


@kernel
def norm_part(x: int, rows: int, stride: int, size: int, weight: int, epsilon: Any) -> None:
    """In place: the RMS norm of ``size`` floats at ``x`` and of those at every further row, ``stride`` floats apart."""
    scale = floats(weight, size)
    for row in range(rows):
        part = floats(x + 4 * row * stride, size)
        normalize(part, scale, epsilon, part)


@kernel
def _sum(x):  # type: ignore[no-untyped-def]
    lanes = np.zeros(LANES, np.float32)
    whole = x.shape[0] // LANES
    for block in range(whole):
        part = x[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += part[lane]
    for lane in range(x.shape[0] - whole * LANES):
        lanes[lane] += x[whole * LANES + lane]
    total = ZERO
    for lane in range(LANES):
        total += lanes[lane]
    return total


@kernel
def layer_norm(x: int, rows: int, size: int, weight: int, bias: int, epsilon: Any, out: int) -> None:
    """float32 [T, D] at ``out`` from x [T, D], weight [D] and bias [D], every row by itself."""
    scale, more, centred = floats(weight, size), floats(bias, size), np.empty(size, np.float32)
    for row in range(rows):
        values, result = floats(x + 4 * row * size, size), floats(out + 4 * row * size, size)
        mean = _sum(values) / np.float32(size)
        for i in range(size):
            centred[i] = values[i] - mean
        normalize(centred, scale, epsilon, result)
        for i in range(size):
            result[i] += more[i]
