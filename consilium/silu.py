"""SiLU(gate) · up with the same bits on every CPU.

SiLU(x) = x / (1 + exp(-x)). All of it is exactly defined by IEEE 754 but exp, so exp is defined here, in float32:
    x' = x clamped to [-88, 89]
    n  = round_half_even(x' · log2 e)
    r  = (x' - n · LN2_HIGH) - n · LN2_LOW              |r| <= ln 2 / 2
    p  = C0 + r · (C1 + r · (C2 + … + r · C6))          every multiply and every add rounded by itself, none fused
    exp(x) = p · 2^n                                    n >= 128 counts as infinity, n <= -127 as zero
The relative error is below 1e-7. Letters: P rows, F expert FFN size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

LOWEST, HIGHEST = np.float32(-88.0), np.float32(89.0)
LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that n times it is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# The polynomial of degree 6 nearest to exp on [-ln 2 / 2, ln 2 / 2] among those that begin with 1 + r.
COEFFICIENTS = tuple(map(np.float32, (1.0, 1.0, 0.49999994, 0.16666521, 0.04166839, 0.008368717, 0.00138146)))
EXPONENT_BIAS, MANTISSA_BITS = 127, 23

# Elements worked on at a time: the dozen passes over them then stay in the level-2 cache.
BLOCK = 16384


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up for gate_up [P, 2F] float32, the gate's columns first; float32 [P, F]."""
    pairs, size = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = torch.empty(pairs, size)  # [P, F]
    source, target = gate_up.numpy(), hidden.numpy()
    step = max(1, BLOCK // max(1, size))
    with np.errstate(all="ignore"):  # infinities and NaNs pass through as IEEE has it
        for start in range(0, pairs, step):
            rows = slice(start, start + step)
            gate, up = source[rows, :size], source[rows, size:]
            divisor = exp(-gate)
            divisor += np.float32(1.0)
            np.divide(gate, divisor, out=divisor)
            np.multiply(divisor, up, out=target[rows])
    return hidden


def exp(x: Floats) -> Floats:
    """exp(x) as this module defines it, in a new array of the same shape."""
    r = np.maximum(x, LOWEST)
    np.minimum(r, HIGHEST, out=r)
    n = r * LOG2_E
    np.rint(n, out=n)
    r -= n * LN2_HIGH
    r -= n * LN2_LOW
    p = r * COEFFICIENTS[-1]
    for coefficient in COEFFICIENTS[-2:0:-1]:
        p += coefficient
        p *= r
    p += COEFFICIENTS[0]
    exponents = n.astype(np.int32)
    exponents += EXPONENT_BIAS
    exponents <<= MANTISSA_BITS
    p *= exponents.view(np.float32)
    return p
