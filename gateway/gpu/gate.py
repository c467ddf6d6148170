"""Softmax, then the K largest (consilium.gate.softmax_top_k), on a device: each row by itself, in a fixed order.

Letters: T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.jit import EXACT, INTERPRETED, jit, jit_for_any, power_of_two, tiles_of

PART = 256  # of D that one program sums up, one after the other: so a row's sums do not depend on the tile it is in


class Tile(NamedTuple):
    """What one program computes of a part of D."""

    rows: int
    experts: int
    depth: int  # of D at a time
    warps: int


FEW, MANY = Tile(16, 16, 64, 4), Tile(64, 64, 32, 8)
MOST_FEW = 128  # rows
if INTERPRETED:
    MANY = FEW  # a library's products: their sums do depend on the tile


def route(x: Tensor, gate: Tensor, *, normalize: bool, ids: Tensor, weights: Tensor) -> None:
    """``ids`` int32 [T, K] ascending and ``weights`` float32 [T, K] for x [T, D] and the gate's matrix [E, D], float32.

    Equal scores go to the lower id. A row that is not finite gets the first K experts, with weights that are NaN.
    """
    (rows, size), experts = x.shape, len(gate)
    parts, tile = tiles_of(size, PART), FEW if rows <= MOST_FEW else MANY
    logits = torch.empty(rows, parts, experts, device=x.device)
    grid = (tiles_of(rows, tile.rows), tiles_of(experts, tile.experts), parts)
    shape = {"SIZE": size, "PART": PART, "ROWS": tile.rows, "COLUMNS": tile.experts, "DEPTH": tile.depth}
    _logits[grid](x, gate, logits, rows, experts, **shape, num_warps=tile.warps, **EXACT)
    chosen = {"EXPERTS": experts, "BLOCK": power_of_two(experts), "TOP_K": ids.shape[1], "NORMALIZE": normalize}
    _choose[(rows,)](logits, ids, weights, PARTS=parts, **chosen, num_warps=1 if experts <= 256 else 4, **EXACT)


@jit_for_any("rows")
def _logits(
    x: tl.tensor,
    gate: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """out [T, parts, E]: the sums of part program_id(2) of D."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part, depth = tl.program_id(2), tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, PART, DEPTH):
        start = part * PART + step
        inside = start + depth < SIZE
        left, right = (row < rows)[:, None] & inside[None, :], inside[:, None] & (column < columns)[None, :]
        a = tl.load(x + row[:, None] * SIZE + start + depth[None, :], mask=left, other=0.0)
        b = tl.load(gate + column[None, :] * SIZE + start + depth[:, None], mask=right, other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    place = (row * tl.num_programs(2) + part)[:, None] * columns + column[None, :]
    tl.store(out + place, sums, mask=(row < rows)[:, None] & (column < columns)[None, :])


@jit
def _choose(
    logits: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    own, inside = tl.zeros((BLOCK,), tl.float32), expert < EXPERTS
    for part in tl.static_range(PARTS):
        own = own + tl.load(logits + (row * PARTS + part) * EXPERTS + expert, mask=inside, other=float("-inf"))
    odd = tl.sum(((own != own) | (own == float("inf"))).to(tl.int32), axis=0) > 0
    e = tl.exp(own - tl.max(own, axis=0))
    scores = tl.math.div_rn(e, tl.broadcast_to(tl.sum(e, axis=0), e.shape))
    left = tl.where(inside, scores, -1.0)
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
