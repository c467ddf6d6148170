"""Products that every head makes with a matrix of its own, as multi-head latent attention needs them, in fixed order.

Letters: T rows, H heads, K what is summed over, N outputs of a head.
"""

from __future__ import annotations

from typing import Any

from consilium.kernels.compiler import kernel
from consilium.kernels.float_tile import LANES
from consilium.kernels.product import product
from consilium.kernels.sharing import done, meet, take


@kernel
def multiply_heads(
    form: Any,
    a: int,
    a_row: int,
    a_head: int,
    rows: int,
    b: int,
    heads: int,
    size: int,
    columns: int,
    out: int,
    out_row: int,
    out_head: int,
    sharer: Any,
) -> None:
    """out[t, h, n] = sum over k, in order, of a[t, h, k] · b[h, k, n]; threads share the heads.

    ``a`` and ``out`` are float32 with strides in bytes; ``b`` [H, K, N] is contiguous, of the type that ``form`` says,
    and N is a multiple of 16.
    """
    item = 4 if len(form) == 0 else 2
    head = take(sharer, heads)
    while head >= 0:
        left, right, place = a + head * a_head, b + head * size * columns * item, out + head * out_head
        vectors, line = columns // LANES, item * columns
        product(form, left, a_row, 4, rows, right, line, item * LANES, vectors, size, place, out_row, 4 * LANES)
        done(sharer)
        head = take(sharer, heads)
    meet(sharer, heads)
