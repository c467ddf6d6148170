"""The exact product of int8 rows with int8 weights, as consilium.quantization defines it.

Letters: M rows, N output channels, K what is summed over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import quantize_row
from consilium.kernels.compiler import bytes_, floats, ints, kernel
from consilium.kernels.int8_tile import tile_1x1, tile_1x4, tile_2x4, tile_4x4

BLOCK = 64  # rows of x that one pass over the weights serves; with 2048 bytes each they stay in the level-2 cache
ZERO_POINT = np.int32(128)


@kernel
def sums(kind: Any, x: int, rows: int, w: int, columns: int, size: int, out: int, out_stride: int) -> None:
    """int32 [M, N] at ``out``: x [M, K] times the transpose of w [N, K], for the kind VNNI plus 128 · sum of x's row.

    ``out_stride`` is in bytes, for it may be part of a wider matrix.
    """
    for start in range(0, rows, BLOCK):
        stop = min(rows, start + BLOCK)
        column = 0
        while column + 4 <= columns:
            weights, place, row = w + column * size, out + 4 * column, start
            while row + 4 <= stop:
                tile_4x4(kind, x + row * size, size, weights, size, size, place + row * out_stride, out_stride)
                row += 4
            if row + 2 <= stop:
                tile_2x4(kind, x + row * size, size, weights, size, size, place + row * out_stride, out_stride)
                row += 2
            if row < stop:
                tile_1x4(kind, x + row * size, size, weights, size, size, place + row * out_stride, out_stride)
            column += 4
        for last in range(column, columns):
            for row in range(start, stop):
                place = out + row * out_stride + 4 * last
                tile_1x1(kind, x + row * size, size, w + last * size, size, size, place, out_stride)


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
    sums(kind, x, rows, w, columns, size, out, 4 * stride)
    scales = floats(x_scales, rows)
    for row in range(rows):
        place = out + 4 * row * stride
        surplus = correction(kind, x + row * size, size)
        rescale(place, surplus, scales[row], w_scales, columns, place)


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
