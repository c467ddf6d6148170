"""The weighted sum of experts' outputs, added to the residual stream: bit for bit what gateway.batches.combine gives.

Letters: T tokens, D hidden size, K experts per token.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from consilium.gpu.jit import EXACT, jit, power_of_two, tiles_of

MOST_AT_ONCE = 1024  # elements of a row


def combine(x: Tensor, rows: Tensor, weights: Tensor) -> None:
    """x [T, D] += sum over k, in order, of rows [T * K, D] · weights [T, K]; rows are bfloat16 or float32."""
    (tokens, size), top_k = x.shape, weights.shape[1]
    block = min(power_of_two(size), MOST_AT_ONCE)
    grid = (tokens, tiles_of(size, block))
    _combine[grid](x, rows, weights, SIZE=size, TOP_K=top_k, BLOCK=block, **EXACT)


@jit
def _combine(
    x: tl.tensor, rows: tl.tensor, weights: tl.tensor, SIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        row = tl.load(rows + pair * SIZE + place, mask=inside, other=0.0).to(tl.float32)
        total = total + row * tl.load(weights + pair)
    before = tl.load(x + token * SIZE + place, mask=inside, other=0.0)
    tl.store(x + token * SIZE + place, before + total, mask=inside)
