"""The exact product of int8 rows with int8 weights, as consilium.quantization defines it.

Letters: M rows, N output channels, K what is summed over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import quantize_row
from consilium.kernels.compiler import bytes_, floats, ints, kernel
from consilium.kernels.int8_tile import tile_1x1, tile_1x4, tile_2x4, tile_4x4
from consilium.kernels.sharing import done, meet, take

BLOCK = 64  # rows of x that one pass over the weights serves; with 2048 bytes each they stay in the level-2 cache
FARTHEST = 2**14  # bytes ahead that long rows of weights are asked for, where few rows of x leave no time for more
COLUMNS = 32  # of a block that a thread takes: some 5 µs of reading weights
ZERO_POINT = np.int32(128)


@kernel
def sums(kind: Any, x: int, rows: int, w: int, columns: int, size: int, out: int, out_stride: int) -> None:
    """int32 [M, N] at ``out``: x [M, K] times the transpose of w [N, K], for the kind VNNI plus 128 · sum of x's row.

    ``out_stride`` is in bytes, for it may be part of a wider matrix.
    """
    for start in range(0, rows, BLOCK):
        stop = min(rows, start + BLOCK)
        tiles = min(4, (stop - start + 3) // 4)  # that read the same weights, and fetch each its part of the next ones
        ahead = 4 * size if tiles > 1 else min(4 * size, FARTHEST)
        column = 0
        while column + 4 <= columns:
            weights, place, row = w + column * size, out + 4 * column, start
            while row < stop:
                left, target, tile = x + row * size, place + row * out_stride, (row - start) // 4
                first = 4 * tile // tiles
                fetches = 4 * (tile + 1) // tiles - first if tile < tiles else 0
                right = weights, size, size, target, out_stride, weights + ahead + first * size, fetches
                if row + 4 <= stop:
                    tile_4x4(kind, left, size, *right)
                    row += 4
                elif row + 2 <= stop:
                    tile_2x4(kind, left, size, *right)
                    row += 2
                else:
                    tile_1x4(kind, left, size, *right)
                    row += 1
            column += 4
        for last in range(column, columns):
            for row in range(start, stop):
                place = out + row * out_stride + 4 * last
                tile_1x1(kind, x + row * size, size, w + last * size, size, size, place, out_stride, 0, 0)


@kernel
def correction(kind: Any, row: int, size: int) -> Any:
    """What ``sums`` has too much in each channel of the int8 ``row``: 0 or 128 times its sum."""
    total = np.int32(0)
    if len(kind) == 0:
        for value in bytes_(row, size):
            total = np.int32(total + value)
    return np.int32(total * ZERO_POINT)


@kernel
def rescale(found: int, surplus: Any, x_scale: Any, w_scales: int, columns: int, out: int) -> None:
    """float32 [N] at ``out`` from int32 [N]: (float32(sum) · x_scale) · w_scale, rounded at each of the three steps."""
    integers, scales, row = ints(found, columns), floats(w_scales, columns), floats(out, columns)
    for column in range(columns):
        # In 32 bits as the sums are: what overflowed on the way comes back.
        row[column] = np.float32(np.int32(integers[column] - surplus)) * x_scale * scales[column]


@kernel
def multiply(
    kind: Any, x: int, x_scales: int, rows: int, w: int, w_scales: int, columns: int, size: int, out: int, stride: int
) -> None:
    """float32 [M, N] at ``out``, rows ``stride`` floats apart: int8 x [M, K] and w [N, K] with their scales."""
    surplus = corrections(kind, x, rows, size)
    multiply_corrected(kind, x, x_scales, surplus, rows, w, w_scales, columns, size, out, stride)


@kernel
def corrections(kind: Any, x: int, rows: int, size: int) -> Any:
    """int32 [M]: the ``correction`` of each row."""
    found = np.empty(rows, np.int32)
    for row in range(rows):
        found[row] = correction(kind, x + row * size, size)
    return found


@kernel
def multiply_corrected(kind, x, x_scales, surplus, rows, w, w_scales, columns, size, out, stride):  # type: ignore[no-untyped-def]
    """``multiply`` where the rows' corrections are known."""
    sums(kind, x, rows, w, columns, size, out, 4 * stride)
    scales = floats(x_scales, rows)
    for row in range(rows):
        place = out + 4 * row * stride
        rescale(place, surplus[row], scales[row], w_scales, columns, place)


@kernel
def multiply_shared(
    kind: Any,
    x: int,
    x_scales: int,
    rows: int,
    w: int,
    w_scales: int,
    columns: int,
    size: int,
    out: int,
    sharer: Any,
) -> None:
    """``multiply`` by several threads, in blocks of ``COLUMNS`` columns."""
    blocks = count_blocks(columns)
    block = take(sharer, blocks)
    if block >= 0:  # else it may be over, and x gone
        surplus = corrections(kind, x, rows, size)
    while block >= 0:
        first = block * COLUMNS
        count = min(COLUMNS, columns - first)
        right = w + first * size, w_scales + 4 * first
        multiply_corrected(kind, x, x_scales, surplus, rows, *right, count, size, out + 4 * first, columns)
        done(sharer)
        block = take(sharer, blocks)
    meet(sharer, blocks)


@kernel
def count_blocks(columns: int) -> int:
    """Blocks that threads share a product of so many columns in."""
    return (columns + COLUMNS - 1) // COLUMNS


@kernel
def quantize(x: int, rows: int, size: int, values: int, scales: int) -> None:
    """int8 [M, K] and float32 [M] from x float32 [M, K], every row by itself."""
    found = floats(scales, rows)
    for row in range(rows):
        found[row] = quantize_row(floats(x + 4 * row * size, size), bytes_(values + row * size, size))


@kernel
def rescale_rows(found: int, x_scales: int, rows: int, w_scales: int, columns: int, out: int) -> None:
    """float32 [M, N] at ``out`` from exact int32 [M, N]."""
    scales = floats(x_scales, rows)
    for row in range(rows):
        place = 4 * row * columns
        rescale(found + place, np.int32(0), scales[row], w_scales, columns, out + place)
