"""Softmax, then the K largest (consilium.gate.softmax_top_k), on a device: each row by itself, in a fixed order.

Letters: T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.jit import EXACT, jit, jit_for_any, power_of_two, tiles_of

ROWS, EXPERTS, DEPTH = 16, 16, 64  # of one program: always the same, so that a row's sums are


def route(x: Tensor, gate: Tensor, *, normalize: bool, ids: Tensor, weights: Tensor) -> None:
    """``ids`` int32 [T, K] ascending and ``weights`` float32 [T, K] for x [T, D] and the gate's matrix [E, D], float32.

    Equal scores go to the lower id. A row that is not finite gets the first K experts, with weights that are NaN.
    """
    (rows, size), experts = x.shape, len(gate)
    logits = torch.empty(rows, experts, device=x.device)
    grid = (tiles_of(rows, ROWS), tiles_of(experts, EXPERTS))
    shape = {"SIZE": size, "ROWS": ROWS, "COLUMNS": EXPERTS, "DEPTH": DEPTH}
    _logits[grid](x, gate, logits, rows, experts, **shape, **EXACT)
    chosen = {"EXPERTS": experts, "BLOCK": power_of_two(experts), "TOP_K": ids.shape[1], "NORMALIZE": normalize}
    _choose[(rows,)](logits, ids, weights, **chosen, num_warps=1 if experts <= 256 else 4, **EXACT)


@jit_for_any("rows")
def _logits(
    x: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, SIZE, DEPTH):
        inside = start + depth < SIZE
        left, right = (row < rows)[:, None] & inside[None, :], inside[:, None] & (column < columns)[None, :]
        a = tl.load(x + row[:, None] * SIZE + start + depth[None, :], mask=left, other=0.0)
        b = tl.load(gate + column[None, :] * SIZE + start + depth[:, None], mask=right, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    place = row[:, None] * columns + column[None, :]
    tl.store(out + place, sums, mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit
def _choose(
    logits: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    own = tl.load(logits + row * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf"))
    odd = tl.sum(((own != own) | (own == float("inf"))).to(tl.int32), axis=0) > 0
    e = tl.exp(own - tl.max(own, axis=0))
    scores = tl.math.div_rn(e, tl.broadcast_to(tl.sum(e, axis=0), e.shape))
    left = tl.where(expert < EXPERTS, scores, -1.0)
    chosen = expert < 0
    for _ in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=0, tie_break_left=True)
        chosen = chosen | (expert == best)
        left = tl.where(expert == best, -2.0, left)
    chosen = tl.where(odd, expert < TOP_K, chosen)
    kept = tl.where(chosen, scores, 0.0)
    if NORMALIZE:
        kept = tl.math.div_rn(kept, tl.broadcast_to(tl.sum(kept, axis=0), kept.shape))
    kept = tl.where(odd, float("nan"), kept)
    place = row * TOP_K + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(ids + place, expert, mask=chosen)
    tl.store(weights + place, kept, mask=chosen)
