"""The two grouped products of a layer's experts: rows times gate and up, hidden rows times down.

A program computes one tile of rows of one expert against one tile of its columns. Where an expert's weights lie it
reads from a table of addresses, so that experts come and go without anything being copied or stacked.

Integers (W8A8) as consilium.int8_experts: int32 sums, scales one after the other, SiLU by the fixed polynomial; hidden
rows are quantized as a whole, from the largest magnitudes of their column tiles. Floats (weights int8, or the rows'
dtype) are summed in float32, in the order of the matrix instructions.

Letters: P pairs, E experts, D hidden size, F expert FFN size; M, N, K of a tile: rows, columns, what is summed over.
"""

from __future__ import annotations

import triton.language as tl

from consilium.gpu.arithmetic import bfloat16_bits, clamped_swiglu, magnitude, quantize, scale_of, silu_and_multiply
from consilium.gpu.jit import jit

# Columns of a table [E, COLUMNS]: addresses of values and scales of each matrix, and of the biases; 0 is none.
GATE, GATE_SCALES, UP, UP_SCALES, DOWN, DOWN_SCALES = (tl.constexpr(each) for each in range(6))
GATE_BIAS, UP_BIAS, DOWN_BIAS = (tl.constexpr(each) for each in range(6, 9))
COLUMNS = tl.constexpr(9)


@jit
def matrix(table: tl.tensor, expert: tl.tensor, column: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """A pointer to what an entry of ``table`` says."""
    address = tl.load(table + expert.to(tl.int64) * COLUMNS + column)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@jit
def add_products(sums: tl.tensor, x: tl.tensor, w: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """sums [M, N] with x [M, K] times w [K, N], in int32 for int8, else in float32 from numbers as ``dtype``."""
    if dtype == tl.int8:
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
    else:
        sums = tl.dot(x.to(dtype), w.to(dtype), sums, input_precision="ieee")
    return sums


@jit
def load_part(pointers: tl.tensor, place: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """What lies at ``pointers``, zeros where ``place`` in what is summed over is past SIZE."""
    return tl.load(pointers) if SIZE % BLOCK == 0 else tl.load(pointers, mask=place < SIZE, other=0)


@jit
def load_rows(
    pointers: tl.tensor, there: tl.tensor, place: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """As load_part, of the rows that are ``there`` [M]: the others are zeros, which takes no reading."""
    mask = there[:, None] if SIZE % BLOCK == 0 else there[:, None] & (place < SIZE)
    return tl.load(pointers, mask=mask, other=0)


@jit
def scaled(
    sums: tl.tensor,
    x_scales: tl.tensor,
    table: tl.tensor,
    expert: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor,
    n: tl.tensor,
    INTEGER: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
) -> tl.tensor:
    """float32 of sums [M, N] with the scales of rows [M] and of columns ``n`` [N], and their biases."""
    found = sums.to(tl.float32)
    if INTEGER:
        found = found * x_scales[:, None]
    if SCALED:
        found = found * tl.load(matrix(table, expert, scales, tl.float32) + n)[None, :]
    if BIASED:
        found = found + tl.load(matrix(table, expert, bias, tl.float32) + n)[None, :]
    return found


@jit
def store_rows(out: tl.tensor, rows: tl.tensor, mask: tl.tensor, dtype: tl.constexpr) -> None:
    """Store float32 as ``dtype``; for bfloat16 ``out`` are pointers to its bits."""
    if dtype == tl.bfloat16:
        tl.store(out, bfloat16_bits(rows), mask=mask)
    else:
        tl.store(out, rows, mask=mask)


@jit
def gate_up(
    table: tl.tensor,
    tiles: tl.tensor,
    source: tl.tensor,
    x: tl.tensor,
    x_scales: tl.tensor,
    hidden: tl.tensor,
    largest: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALED: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    HIDDEN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """hidden [P, F] in the pairs' order, of tile program_id(0) and columns program_id(1), from rows x [U, D].

    For integers hidden is float32, and ``largest`` int32 [P, column tiles] has the largest magnitudes of each row.
    W and HIDDEN are the dtypes of weights and hidden rows; products are computed in DOT.
    """
    tile = tiles + 3 * tl.program_id(0)
    expert, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first < last:
        m, k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = n if F % BLOCK_N == 0 else tl.minimum(n, F - 1)  # whatever comes of the last one again is not stored
        rows = tl.load(source + m, mask=m < last, other=0).to(tl.int64)
        x_part = x + rows[:, None] * D + k[None, :]
        place = column[None, :] * D + k[:, None]
        gate = matrix(table, expert, GATE, W) + place
        up = matrix(table, expert, UP, W) + place
        gates = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
        ups = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
        for start in range(0, D, BLOCK_K):
            part = load_rows(x_part + start, m < last, start + k[None, :], D, BLOCK_K)
            gates = add_products(gates, part, load_part(gate + start, start + k[:, None], D, BLOCK_K), DOT)
            ups = add_products(ups, part, load_part(up + start, start + k[:, None], D, BLOCK_K), DOT)
        scales = tl.load(x_scales + rows) if INTEGER else 0.0
        g = scaled(gates, scales, table, expert, GATE_SCALES, GATE_BIAS, column, INTEGER, SCALED, BIASED)
        u = scaled(ups, scales, table, expert, UP_SCALES, UP_BIAS, column, INTEGER, SCALED, BIASED)
        h = clamped_swiglu(g, u, alpha, limit) if CLAMPED else silu_and_multiply(g, u)
        inside = (m < last)[:, None] & (n < F)[None, :]
        store_rows(hidden + m.to(tl.int64)[:, None] * F + n[None, :], h, inside, HIDDEN)
        if INTEGER:
            found = tl.max(tl.where(inside, magnitude(h), 0), axis=1)
            tl.store(largest + m * tl.num_programs(1) + tl.program_id(1), found, mask=m < last)


@jit
def largest_of(
    largest: tl.tensor, m: tl.tensor, inside: tl.tensor, TILES: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """The largest magnitude of each of the rows ``m`` [M]."""
    tile = tl.arange(0, BLOCK)
    mask = inside[:, None] & (tile < TILES)[None, :]
    return tl.max(tl.load(largest + m[:, None] * TILES + tile[None, :], mask=mask, other=0), axis=1)


@jit
def down(
    table: tl.tensor,
    tiles: tl.tensor,
    target: tl.tensor,
    hidden: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    D: tl.constexpr,
    F: tl.constexpr,
    INTEGER: tl.constexpr,
    SCALED: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    REPLY: tl.constexpr,
    TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """out [.., D] at the pairs' targets, of tile program_id(0) and columns program_id(1), from hidden [P, F].

    For integers hidden is float32, and ``scales`` are the largest magnitudes int32 [P, TILES] that gate_up left; or
    where TILES is 0, hidden is int8, and scales are float32 [P].
    """
    tile = tiles + 3 * tl.program_id(0)
    expert, first, last = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first < last:
        m, k = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = n if D % BLOCK_N == 0 else tl.minimum(n, D - 1)
        inside = m < last
        row = tl.where(inside, m, first)
        scale = tl.zeros((BLOCK_M,), tl.float32)
        if TILES > 0:
            scale = scale_of(largest_of(scales, row, inside, TILES, TILES_BLOCK))
        elif INTEGER:
            scale = tl.load(scales + row)
        x_part = hidden + row.to(tl.int64)[:, None] * F + k[None, :]
        w_part = matrix(table, expert, DOWN, W) + column[None, :] * F + k[:, None]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
        for start in range(0, F, BLOCK_K):
            part = load_rows(x_part + start, inside, start + k[None, :], F, BLOCK_K)
            if TILES > 0:
                part = quantize(part, scale[:, None].broadcast_to(part.shape))
            sums = add_products(sums, part, load_part(w_part + start, start + k[:, None], F, BLOCK_K), DOT)
        rows = scaled(sums, scale, table, expert, DOWN_SCALES, DOWN_BIAS, column, INTEGER, SCALED, BIASED)
        places = tl.load(target + m, mask=inside, other=0).to(tl.int64)
        store_rows(out + places[:, None] * D + n[None, :], rows, inside[:, None] & (n < D)[None, :], REPLY)
