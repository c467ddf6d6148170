"""What kernels do with floats one by one: exp, SiLU, quantizing, bfloat16. The same bits on every CPU.

SiLU(x) = x / (1 + exp(-x)). All of it is exactly defined by IEEE 754 but exp, so exp is defined here, in float32:
    x' = x clamped to [-88, 89]
    n  = round_half_even(x' · log2 e)
    r  = (x' - n · LN2_HIGH) - n · LN2_LOW              |r| <= ln 2 / 2
    p  = C0 + r · (C1 + r · (C2 + … + r · C6))          every multiply and every add rounded by itself, none fused
    exp(x) = p · 2^n                                    n >= 128 counts as infinity, n <= -127 as zero
The relative error is below 1e-7. Quantizing is defined in consilium.quantization.

Everything is written so that LLVM makes vectors of it without changing a bit: it is element by element, no sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from consilium.kernels.compiler import floats, kernel

LOWEST, HIGHEST = np.float32(-88.0), np.float32(89.0)
LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts; the first has so few bits that n times it is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# The polynomial of degree 6 nearest to exp on [-ln 2 / 2, ln 2 / 2] among those that begin with 1 + r.
COEFFICIENTS = tuple(map(np.float32, (1.0, 1.0, 0.49999994, 0.16666521, 0.04166839, 0.008368717, 0.00138146)))
C0, C1, C2, C3, C4, C5, C6 = COEFFICIENTS
BIAS, MANTISSA = np.int32(127), np.int32(23)
ZERO, ONE, NAN = np.float32(0), np.float32(1), np.float32(np.nan)
LEVELS, SMALLEST_SCALE = np.float32(127), np.finfo(np.float32).tiny
# Adding and taking away 1.5 · 2^23 rounds to the nearest integer, half to even, for |x| < 2^22; unlike rint, LLVM
# makes vectors of it.
ROUNDER = np.float32(12582912)
SIGN_OFF, INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


def _define_cast(source: Any, target: Any, llvm_target: ir.Type) -> Any:
    def cast(context: Any, value: Any) -> Any:  # noqa: ARG001 (numba gives both)
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:  # noqa: ARG001
            return builder.bitcast(args[0], llvm_target)

        return target(source), generate

    return intrinsic(cast)


as_float = _define_cast(types.int32, types.float32, ir.FloatType())  # the float32 with these bits
as_int = _define_cast(types.float32, types.int32, ir.IntType(32))  # the bits of a float32


@kernel
def exp(x: Any) -> Any:
    """exp of a float32 as defined above; NaN stays NaN."""
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = r * C6
    p = (p + C5) * r
    p = (p + C4) * r
    p = (p + C3) * r
    p = (p + C2) * r
    p = (p + C1) * r
    p = p + C0
    exponent = np.int32(n if n == n else ZERO) + BIAS
    return p * as_float(exponent << MANTISSA)


@kernel
def silu_and_multiply(gate: Any, up: Any, out: Any) -> None:
    """out [F] = SiLU(gate [F]) · up [F]; ``out`` may be one of them."""
    for i in range(gate.shape[0]):
        x = gate[i]
        out[i] = (x / (exp(-x) + ONE)) * up[i]


@kernel
def clamped_swiglu_all(gate: int, up: int, size: int, alpha: Any, limit: Any, out: int) -> None:
    """float32 [size] at ``out``: g / (1 + exp(-alpha · g)) · (u + 1), g clamped from above and u to both sides."""
    gates, ups, results = floats(gate, size), floats(up, size), floats(out, size)
    for i in range(size):
        g, u = gates[i], ups[i]
        g = limit if g > limit else g
        u = limit if u > limit else u
        u = -limit if u < -limit else u
        results[i] = (g / (exp(-(g * alpha)) + ONE)) * (u + ONE)


@kernel
def exp_all(x: int, size: int, out: int) -> None:
    """float32 [size] at ``out``: exp of those at ``x``."""
    values, results = floats(x, size), floats(out, size)
    for i in range(size):
        results[i] = exp(values[i])


@kernel
def silu_and_multiply_all(gate: int, up: int, size: int, out: int) -> None:
    """float32 [size] at ``out``: SiLU(gate) · up of those at ``gate`` and ``up``."""
    silu_and_multiply(floats(gate, size), floats(up, size), floats(out, size))


@kernel
def quantize_row(x: Any, values: Any) -> Any:
    """values int8 [K] from x float32 [K]; returns the scale (0 for a row of zeros, NaN for one that is not finite)."""
    largest = np.int32(0)
    for i in range(x.shape[0]):  # the bits of floats without their sign are in the floats' order, infinity and NaN last
        bits = as_int(x[i]) & SIGN_OFF
        largest = max(largest, bits)
    scale = as_float(largest) / LEVELS
    if largest >= INFINITY_BITS or scale < SMALLEST_SCALE:
        values[:] = 0
        return NAN if largest >= INFINITY_BITS else ZERO
    for i in range(x.shape[0]):
        values[i] = np.int8(np.int32((x[i] / scale + ROUNDER) - ROUNDER))
    return scale


@kernel
def to_bfloat16(x: Any) -> Any:
    """The 16 bits of the bfloat16 nearest to a float32, ties to even."""
    bits = np.uint32(as_int(x))
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def from_bfloat16(bits: Any) -> Any:
    """The float32 with these upper 16 bits."""
    return as_float(np.int32(np.uint32(bits) << np.uint32(16)))
