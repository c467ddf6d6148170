"""Attention over pages of keys and values, decoding and prompts in one kernel: the same bits for a row in either.

Positions are cut into chunks of a fixed size. Within a chunk, keys are taken a tile at a time, with a running maximum
and sum (Milakov & Gimelshein 2018; Dao et al. 2022, "FlashAttention"); chunks are merged from the first to the last.
Many rows walk through their chunks in one program; few have a program for every chunk, and ``merge`` does what is left
(Dao et al. 2023, "Flash-Decoding"). Both do the same operations in the same order on tiles of the same shape, and a
row sees nothing of its neighbours in a tile, so its bits do not depend on chunk, batch or split.

Letters: T rows, H query heads, Hkv key-value heads, G = H / Hkv, d head size, C chunks.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arithmetic import bfloat16_bits, magnitude, quantize, scale_of
from consilium.gpu.jit import EXACT, INTERPRETED, jit, jit_for_any, power_of_two
from consilium.quantization import Quantized
from gateway.gpu.heads import HeadShape
from gateway.gpu.pages import PAGE, LayerPages
from gateway.gpu.tiling import Tiles

LOG2_E = 1.4426950408889634


def attend(queries: Tensor, shape: HeadShape, pages: LayerPages, tiles: Tiles, window: int, out: Quantized) -> None:
    """Attention of ``queries`` [T, H, d], of the pages' dtype, as int8 rows [T, H d]. ``window`` 0 is none."""
    rows, device, tiling = len(queries), queries.device, tiles.tiling
    sums = torch.empty(rows, shape.heads, tiles.partials, shape.size, device=device)
    heads = torch.empty(rows, shape.heads, tiles.partials, 2, device=device)  # largest score, and total
    positions, half = tiling.positions(shape), pages.keys.dtype is torch.bfloat16
    _attend[(len(tiles.table), shape.kv_heads, tiles.partials)](
        queries,
        *pages,
        tiles.pages,
        tiles.pages.shape[1],
        tiles.table,
        sums,
        heads,
        LOG2_E / shape.size**0.5,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        SIZE=shape.size,
        BLOCK=power_of_two(max(16, shape.size)),
        POSITIONS=positions,
        ROWS=max(16, power_of_two(positions * shape.group)),
        KEYS=tiling.keys,
        CHUNK=tiling.chunk,
        WINDOW=window,
        SPLIT=tiles.split,
        ROUND=half and INTERPRETED,
        OPERAND=tl.bfloat16 if half and not INTERPRETED else tl.float32,
        PAGE=PAGE,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **EXACT,
    )
    _merge[(rows,)](
        sums,
        heads,
        tiles.positions,
        *out,
        tiles.partials,
        HEADS=shape.heads,
        SIZE=shape.size,
        BLOCK_HEADS=power_of_two(shape.heads),
        BLOCK=power_of_two(shape.size),
        SPLIT=tiles.split,
        CHUNK=tiling.chunk,
        WINDOW=window,
        num_warps=8,
        **EXACT,
    )


@jit
def _merged(
    largest: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    other: tl.tensor,
    other_total: tl.tensor,
    other_sums: tl.tensor,
) -> tl.tensor:
    """What was found in the chunks before, and in the next one: largest score, total and sums of both."""
    found = tl.maximum(largest, other)
    base = tl.where(found == float("-inf"), 0.0, found)
    left, right = tl.exp2(largest - base), tl.exp2(other - base)
    return found, total * left + other_total * right, sums * left[:, None] + other_sums * right[:, None]


@jit
def _first_chunk(position: tl.tensor, WINDOW: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """The first chunk that a query at ``position`` sees anything of."""
    return tl.maximum(position + 1 - WINDOW, 0) // CHUNK if WINDOW else position * 0


@jit_for_any("width")
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    sums_out: tl.tensor,
    heads_out: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUND: tl.constexpr,
    OPERAND: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """One tile of queries with one key-value head: all chunks, or the one of program_id(2)."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    own = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 4  # the last ones of a prompt have most to do: first
    row, count, position = tl.load(own).to(tl.int64), tl.load(own + 1), tl.load(own + 2)
    table = pages + tl.load(own + 3).to(tl.int64) * width
    kv_head = tl.program_id(1)
    line = tl.arange(0, ROWS)
    place = line // GROUP  # of the query among those of the tile
    asked = (place < count) & (place < POSITIONS)
    head = kv_head * GROUP + line % GROUP
    depth = tl.arange(0, BLOCK)
    start = (row + place) * HEADS + head
    inside = asked[:, None] & (depth < SIZE)[None, :]
    q = tl.load(queries + start[:, None] * SIZE + depth[None, :], mask=inside, other=0.0).to(OPERAND)
    last = position + count - 1
    first_chunk, end_chunk = _first_chunk(position, WINDOW, CHUNK), last // CHUNK + 1
    part = tl.program_id(2)
    if SPLIT:
        first_chunk, end_chunk = tl.maximum(first_chunk, part), tl.minimum(end_chunk, part + 1)
    found = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for chunk in range(first_chunk, end_chunk):
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        values_sum = tl.zeros((ROWS, BLOCK), tl.float32)
        for key in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, last + 1), KEYS):
            at = key + tl.arange(0, KEYS)
            page = tl.load(table + at // PAGE, mask=at <= last, other=0).to(tl.int64)
            lines = ((page * KV_HEADS + kv_head) * PAGE + at % PAGE) * SIZE
            there = (at <= last)[:, None] & (depth < SIZE)[None, :]
            k = tl.load(keys + lines[:, None] + depth[None, :], mask=there, other=0.0).to(OPERAND)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            seen = at[None, :] <= (position + place)[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > (position + place - WINDOW)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.maximum(largest, tl.max(scores, axis=1))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(largest - base)
            weight = weight * shrink + tl.sum(p, axis=1)
            if ROUND:  # which the interpreter's own cast does not
                p = (bfloat16_bits(p).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            v = tl.load(values + lines[:, None] + depth[None, :], mask=there, other=0.0).to(OPERAND)
            values_sum = values_sum * shrink[:, None] + tl.dot(p.to(OPERAND), v, input_precision="ieee")
            largest = highest
        found, total, sums = _merged(found, total, sums, largest, weight, values_sum)
    parts = tl.num_programs(2)
    target = start * parts + part
    wanted = asked & (first_chunk < end_chunk)
    tl.store(heads_out + target * 2, found, mask=wanted)
    tl.store(heads_out + target * 2 + 1, total, mask=wanted)
    tl.store(sums_out + target[:, None] * SIZE + depth[None, :], sums, mask=wanted[:, None] & (depth < SIZE)[None, :])


@jit_for_any("parts")
def _merge(
    sums_in: tl.tensor,
    heads_in: tl.tensor,
    positions: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    parts: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """All heads of one row: its partial results in order, divided by their total, as int8."""
    row = tl.program_id(0).to(tl.int64)
    head, depth = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK)
    inside = (head < HEADS)[:, None] & (depth < SIZE)[None, :]
    position = tl.load(positions + row)
    first, end = position * 0, position * 0 + 1
    if SPLIT:
        first, end = _first_chunk(position, WINDOW, CHUNK), position // CHUNK + 1
    found = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    sums = tl.zeros((BLOCK_HEADS, BLOCK), tl.float32)
    for part in tl.range(first, end, num_stages=4):
        place = (row * HEADS + head) * parts + part
        largest = tl.load(heads_in + place * 2, mask=head < HEADS, other=float("-inf"))
        weight = tl.load(heads_in + place * 2 + 1, mask=head < HEADS, other=0.0)
        more = tl.load(sums_in + place[:, None] * SIZE + depth[None, :], mask=inside, other=0.0)
        found, total, sums = _merged(found, total, sums, largest, weight, more)
    total = tl.where(head < HEADS, total, 1.0)
    y = tl.math.div_rn(sums, tl.broadcast_to(total[:, None], (BLOCK_HEADS, BLOCK)))
    scale = scale_of(tl.max(tl.max(magnitude(y), axis=1), axis=0))
    tl.store(scales + row, scale)
    target = (row * HEADS + head)[:, None] * SIZE + depth[None, :]
    tl.store(values + target, quantize(y, scale), mask=inside)
