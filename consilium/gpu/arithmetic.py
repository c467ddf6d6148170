"""What kernels do with floats one by one, to the same bits as consilium.kernels.arithmetic, which defines it.

Launch with ``**EXACT`` (consilium.gpu.jit): a fused multiply-add has other bits. Divisions are IEEE's (``div_rn``);
Triton's own ``/`` is not.
"""

from __future__ import annotations

import triton.language as tl

from consilium.gpu.jit import jit
from consilium.kernels import arithmetic as defined

LOWEST, HIGHEST = tl.constexpr(float(defined.LOWEST)), tl.constexpr(float(defined.HIGHEST))
LOG2_E = tl.constexpr(float(defined.LOG2_E))
LN2_HIGH, LN2_LOW = tl.constexpr(float(defined.LN2_HIGH)), tl.constexpr(float(defined.LN2_LOW))
C0, C1, C2, C3, C4, C5, C6 = (tl.constexpr(float(each)) for each in defined.COEFFICIENTS)
ROUNDER, LEVELS = tl.constexpr(float(defined.ROUNDER)), tl.constexpr(float(defined.LEVELS))
SMALLEST_SCALE = tl.constexpr(float(defined.SMALLEST_SCALE))
SIGN_OFF, INFINITY_BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
BIAS, MANTISSA = tl.constexpr(127), tl.constexpr(23)


@jit
def exp(x: tl.tensor) -> tl.tensor:
    """exp of float32; NaN stays NaN."""
    x = tl.where(x < LOWEST, LOWEST, x)
    x = tl.where(x > HIGHEST, HIGHEST, x)
    n = (x * LOG2_E + ROUNDER) - ROUNDER
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = r * C6
    p = (p + C5) * r
    p = (p + C4) * r
    p = (p + C3) * r
    p = (p + C2) * r
    p = (p + C1) * r
    p = p + C0
    whole = tl.where(n == n, n, 0.0).to(tl.int32)
    return p * ((whole + BIAS) << MANTISSA).to(tl.float32, bitcast=True)


@jit
def silu_and_multiply(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    """SiLU(gate) · up."""
    return tl.math.div_rn(gate, exp(-gate) + 1.0) * up


@jit
def clamped_swiglu(gate: tl.tensor, up: tl.tensor, alpha: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """gate / (1 + exp(-alpha · gate)) · (up + 1), gate clamped from above and up to both sides."""
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    return tl.math.div_rn(gate, exp(-(gate * alpha)) + 1.0) * (up + 1.0)


@jit
def magnitude(x: tl.tensor) -> tl.tensor:
    """The bits of floats without their sign, int32: in the floats' order, infinity and NaN last."""
    return x.to(tl.int32, bitcast=True) & SIGN_OFF


@jit
def scale_of(largest: tl.tensor) -> tl.tensor:
    """The scale of a row whose largest ``magnitude`` is this: 0 for one of zeros, NaN for one that is not finite."""
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), LEVELS)
    scale = tl.where(scale < SMALLEST_SCALE, 0.0, scale)
    return tl.where(largest >= INFINITY_BITS, float("nan"), scale)


@jit
def quantize(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """int8 of x by the row's ``scale``, which has x's dimensions; zeros where that is 0 or NaN."""
    usable = scale > 0.0
    levels = tl.math.div_rn(x, tl.where(usable, scale, 1.0))
    levels = (levels + ROUNDER) - ROUNDER
    return tl.where(usable, levels, 0.0).to(tl.int8)


@jit
def bfloat16_bits(x: tl.tensor) -> tl.tensor:
    """int16 with the bits of the bfloat16 nearest to a float32, ties to even; the interpreter's own cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & SIGN_OFF) > INFINITY_BITS, 0x7FC0, rounded).to(tl.int16)
