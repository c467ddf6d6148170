"""Float products of any size out of tiles: out[m, n] = sum over k, in order, of a[m, k] · b[k, n].

Letters: M rows, N vectors of 16 lanes.
"""

from __future__ import annotations

from typing import Any

from consilium.kernels.compiler import kernel
from consilium.kernels.float_tile import tile_1x1, tile_1x4, tile_2x4, tile_4x4


@kernel
def product(
    form: Any,
    a: int,
    a_row: int,
    a_step: int,
    rows: int,
    b: int,
    b_step: int,
    b_vector: int,
    vectors: int,
    size: int,
    out: int,
    out_row: int,
    out_vector: int,
) -> None:
    """out[m, n] for m < ``rows`` and n < ``vectors``; addresses and strides as float_tile has them."""
    n = 0
    while n + 4 <= vectors:
        column, place, m = b + n * b_vector, out + n * out_vector, 0
        while m + 4 <= rows:
            left, target = a + m * a_row, place + m * out_row
            tile_4x4(form, left, a_row, a_step, column, b_step, b_vector, size, target, out_row, out_vector)
            m += 4
        if m + 2 <= rows:
            left, target = a + m * a_row, place + m * out_row
            tile_2x4(form, left, a_row, a_step, column, b_step, b_vector, size, target, out_row, out_vector)
            m += 2
        if m < rows:
            left, target = a + m * a_row, place + m * out_row
            tile_1x4(form, left, a_row, a_step, column, b_step, b_vector, size, target, out_row, out_vector)
        n += 4
    while n < vectors:
        for m in range(rows):
            left, target = a + m * a_row, out + m * out_row + n * out_vector
            tile_1x1(form, left, a_row, a_step, b + n * b_vector, b_step, b_vector, size, target, out_row, out_vector)
        n += 1
