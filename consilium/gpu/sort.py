"""Pairs by expert, without asking the host anything.

Letters: T tokens, K experts of each, P = T · K pairs, E experts, S slots for row tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.jit import jit, jit_for_any, power_of_two

CHUNK = 1024  # pairs that a program looks at together
LEAST_BINS = 128  # one for each thread


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows meet which expert: the pairs in the order of their experts, cut into tiles of a few rows each."""

    source: Tensor  # [P] int32: the row of x that a pair in this order computes from
    target: Tensor  # [P] int32: the row of the output that it goes to
    tiles: Tensor  # [S, 3] int32: expert, first and last + 1 place of each tile; equal ones where a slot is empty
    block: int  # most rows of a tile


def slots_for(pairs: int, experts: int, block: int) -> int:
    """S: tiles there may be, whatever the pairs are."""
    return pairs // block + min(pairs, experts)


@jit
def count_pairs(
    ids: tl.tensor, pairs: tl.tensor, EXPERTS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """[BINS] how often each expert is among the first ``pairs`` ids; below 0 and from EXPERTS on are none."""
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    start = 0
    while start < pairs:
        found = tl.load(ids + start + lane, mask=start + lane < pairs, other=-1)
        counts += tl.histogram(found, BINS, mask=(found >= 0) & (found < EXPERTS))
        start += CHUNK
    return counts


@jit
def _cut(tiles: tl.tensor, expert: tl.tensor, first: tl.tensor, last: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Write the tiles of an expert's places ``first`` to ``last``."""
    while first < last:
        tl.store(tiles, expert)
        tl.store(tiles + 1, first)
        tl.store(tiles + 2, tl.minimum(first + BLOCK, last))
        first += BLOCK
        tiles += 3


@jit
def _place(
    ids: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    pairs: tl.tensor,
    expert: tl.tensor,
    first: tl.tensor,
    PER_TOKEN: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write the pairs of ``expert`` one after the other, from the place ``first`` on."""
    lane = tl.arange(0, CHUNK)
    start = 0
    while start < pairs:
        pair = start + lane
        mine = (tl.load(ids + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
        place = first + tl.cumsum(mine, 0) - 1
        tl.store(source + place, pair // PER_TOKEN, mask=mine != 0)
        tl.store(target + place, pair, mask=mine != 0)
        first += tl.sum(mine)
        start += CHUNK


@jit_for_any("pairs", "slots")
def _sort_pairs(
    ids: tl.tensor,
    table: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    tiles: tl.tensor,
    pairs: tl.tensor,
    slots: tl.tensor,
    COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Expert program_id(0) finds its pairs, in their order, and its tiles; the last program empties unused slots."""
    expert = tl.program_id(0)
    bins, lane = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = count_pairs(ids, pairs, EXPERTS, BINS, CHUNK)
    held = tl.load(table + bins * COLUMNS, mask=bins < EXPERTS, other=0) != 0
    counts = tl.where(held, counts, 0)
    tile_counts = (counts + BLOCK - 1) // BLOCK
    first = tl.sum(tl.where(bins < expert, counts, 0))
    slot = tl.sum(tl.where(bins < expert, tile_counts, 0))
    if expert == EXPERTS:
        while slot < slots:
            tl.store(tiles + 3 * (slot + lane) + 1, 0, mask=slot + lane < slots)
            tl.store(tiles + 3 * (slot + lane) + 2, 0, mask=slot + lane < slots)
            slot += CHUNK
    else:
        last = first + tl.sum(tl.where(bins == expert, counts, 0))
        _cut(tiles + 3 * slot, expert, first, last, BLOCK)
        if first < last:
            _place(ids, source, target, pairs, expert, first, PER_TOKEN, CHUNK)


def sort_pairs(ids: Tensor, table: Tensor, block: int) -> Groups:
    """Groups of all pairs of ids [T, K] int32 whose expert is in ``table`` int64 [E, columns], in tiles of ``block``.

    An expert whose first column is 0 is not held here: its pairs are left out, as are ids below 0 and from E on.
    A pair is computed from its token's row, and goes to its own place among P.
    """
    (tokens, per_token), (experts, columns) = ids.shape, table.shape
    pairs = tokens * per_token
    slots = slots_for(pairs, experts, block)
    source, target = (torch.empty(pairs, dtype=torch.int32, device=ids.device) for _ in range(2))
    tiles = torch.empty(slots, 3, dtype=torch.int32, device=ids.device)
    numbers = columns, experts, max(LEAST_BINS, power_of_two(experts)), per_token, block, CHUNK
    _sort_pairs[(experts + 1,)](ids, table, source, target, tiles, pairs, slots, *numbers)
    return Groups(source, target, tiles, block)
