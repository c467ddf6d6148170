"""All that a layer does before its experts, in one kernel, for few rows: threads are woken once and meet in it.

    a   = attention(norm(x) · qkvᵀ) · outᵀ        products in int8 as consilium.quantization has them
    y   = x + a                                  the residual stream
    out = y and norm(y)

Each phase is as the kernel of its name defines it (norm, linear, attention), so the bits are the same as theirs.
Letters: T rows, D hidden size, H query heads, Hkv key-value heads, d head size, dv that of values, r rotated elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import quantize_row
from consilium.kernels.attention import attend
from consilium.kernels.compiler import bytes_, floats, ints, kernel, longs
from consilium.kernels.linear import COLUMNS, correction, count_blocks, multiply_corrected
from consilium.kernels.norm import normalize
from consilium.kernels.sharing import LINE, done, meet, take

PHASES = 6
NOTHING = np.int64(0)  # numba would compile anew for a 0 that it sees in the code
LAYER, STEP = 19, 10  # numbers a layer and a step have; see ``compute``


def workspace_bytes(rows: int, hidden: int, heads: int, kv_heads: int, size: int, value_size: int) -> int:
    """Memory that a step needs: int8 rows with scales and corrections, queries, keys, values, and heads' outputs."""
    inner, width = heads * value_size, (heads + kv_heads) * size + kv_heads * value_size
    return rows * (max(hidden, inner) + 4 + 4 + 4 * width + 4 * inner) + 2 * LINE


@kernel
def compute(kind: Any, form: Any, epsilon: Any, layer: int, step: int, sharer: Any) -> None:
    """``layer`` int64 [19] has addresses: the input norm's weight; of queries, keys and values together the int8 weight
    [(H + Hkv) d + Hkv dv, D], its scales and its bias or 0; of the norms of queries and keys and of the sinks, or 0; of
    the output projection [D, H dv] as of the first; the second norm's weight. Then D, H, Hkv, d, dv, r, the layer's
    number, its window or 0.

    ``step`` int64 [10] has: x [T, D], T, cosines, sines, segments and how many (see attention.attend), the bytes of a
    row of scratch, the workspace with the scratch behind it, y [T, D] and norm(y) [T, D], all float32.
    """
    fixed, own = longs(layer, LAYER), longs(step, STEP)
    hidden, heads, kv_heads, size, value_size = fixed[11], fixed[12], fixed[13], fixed[14], fixed[15]
    x, rows, workspace = own[0], own[1], own[7]
    inner, width = heads * value_size, (heads + kv_heads) * size + kv_heads * value_size
    values = workspace  # first, for the tiles read it by whole cache lines
    qkv = values + (rows * max(hidden, inner) + LINE - 1) // LINE * LINE
    attended = qkv + 4 * rows * width
    scales = attended + 4 * rows * inner
    surplus = scales + 4 * rows
    scratch = (surplus + 4 * rows + LINE - 1) // LINE * LINE
    quantized = (values, scales, surplus, rows)

    sharer = _norm_and_quantize(kind, x, fixed[0], epsilon, hidden, quantized, sharer)
    sharer = _multiply(kind, quantized, fixed[1], fixed[2], fixed[3], NOTHING, width, hidden, qkv, sharer)
    shape = heads, kv_heads, size, value_size, fixed[16]
    turns = own[2], own[3]
    where = own[4], own[5], fixed[17], fixed[18]
    sharer = attend(form, qkv, *shape, layer + 32, epsilon, *turns, *where, scratch, own[6], attended, sharer)
    sharer = _quantize(kind, attended, inner, quantized, sharer)
    sharer = _multiply(kind, quantized, fixed[7], fixed[8], fixed[9], x, hidden, inner, own[8], sharer)
    _norm(own[8], rows, hidden, fixed[10], epsilon, own[9], sharer)


@kernel
def _norm_and_quantize(kind, x, weight, epsilon, size, target, sharer):  # type: ignore[no-untyped-def]
    scale, normed = floats(weight, size), np.empty(size, np.float32)
    rows = target[3]
    row = take(sharer, rows)
    while row >= 0:
        normalize(floats(x + 4 * row * size, size), scale, epsilon, normed)
        _quantize_row(kind, normed, row, target)
        done(sharer)
        row = take(sharer, rows)
    return meet(sharer, rows)


@kernel
def _quantize(kind, x, size, target, sharer):  # type: ignore[no-untyped-def]
    rows = target[3]
    row = take(sharer, rows)
    while row >= 0:
        _quantize_row(kind, floats(x + 4 * row * size, size), row, target)
        done(sharer)
        row = take(sharer, rows)
    return meet(sharer, rows)


@kernel
def _quantize_row(kind, x, row, target):  # type: ignore[no-untyped-def]
    values, scales, surplus, rows = target
    size = x.shape[0]
    floats(scales, rows)[row] = quantize_row(x, bytes_(values + row * size, size))
    ints(surplus, rows)[row] = correction(kind, values + row * size, size)


@kernel
def _multiply(kind, left, w, w_scales, bias, residual, columns, size, out, sharer):  # type: ignore[no-untyped-def]
    """residual [M, N] + (x [M, K] · w [N, K]ᵀ + bias [N]); where bias or residual is 0 there is none."""
    x, x_scales, surplus, rows = left
    known, blocks = ints(surplus, rows), count_blocks(columns)
    block = take(sharer, blocks)
    while block >= 0:
        first = block * COLUMNS
        count = min(COLUMNS, columns - first)
        place = out + 4 * first
        right = w + first * size, w_scales + 4 * first
        multiply_corrected(kind, x, x_scales, known, rows, *right, count, size, place, columns)
        for row in range(rows):
            found = floats(place + 4 * row * columns, count)
            if bias:
                _add(floats(bias + 4 * first, count), found)
            if residual:
                _add(floats(residual + 4 * (first + row * columns), count), found)
        done(sharer)
        block = take(sharer, blocks)
    return meet(sharer, blocks)


@kernel
def _add(more, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        out[i] += more[i]


@kernel
def _norm(x, rows, size, weight, epsilon, out, sharer):  # type: ignore[no-untyped-def]
    scale = floats(weight, size)
    row = take(sharer, rows)
    while row >= 0:
        normalize(floats(x + 4 * row * size, size), scale, epsilon, floats(out + 4 * row * size, size))
        done(sharer)
        row = take(sharer, rows)
    return meet(sharer, rows)
