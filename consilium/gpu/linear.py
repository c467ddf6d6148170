"""The exact product of int8 rows with int8 weights, as consilium.quantization defines it. Any tiles are right.

Letters: T rows, N output channels, K what is summed over.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from consilium.gpu.jit import EXACT, jit_for_any, tiles_of
from consilium.quantization import Quantized


class Tile(NamedTuple):
    """What one program computes, and how."""

    rows: int
    columns: int
    depth: int  # of K at a time
    warps: int
    stages: int


# By the most rows they are for. Few rows: as many programs as possible read the weights, and each has much in flight.
TILES: dict[int, Tile] = {
    16: Tile(16, 16, 512, 4, 4),
    64: Tile(64, 32, 256, 4, 4),
    256: Tile(64, 64, 128, 4, 4),
    2**31: Tile(128, 128, 128, 8, 3),
}


def linear(
    x: Quantized,
    weight: Quantized,
    out: Tensor,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tile: Tile | None = None,
) -> None:
    """``out`` [T, N] float32 = add + (x [T, K] · weight [N, K] + bias [N]); ``add`` [T, N] may be ``out``.

    ``tile`` is another one than the usual.
    """
    rows, size = x.values.shape
    columns = weight.values.shape[0]
    tile = tile or next(each for most, each in TILES.items() if rows <= most)
    grid = (tiles_of(rows, tile.rows), tiles_of(columns, tile.columns))
    optional = weight.scales if bias is None else bias, out if add is None else add
    chosen = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    given = {"BIAS": bias is not None, "ADD": add is not None}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    _linear[grid](*x, *weight, *optional, out, rows, columns, size, **chosen, **given, **launch, **EXACT)


@jit_for_any("rows")
def _linear(
    x: tl.tensor,
    x_scales: tl.tensor,
    weight: tl.tensor,
    w_scales: tl.tensor,
    bias: tl.tensor,
    add: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [T]
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)  # [N]
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, SIZE, DEPTH):
        left, right = (row < rows)[:, None], (column < columns)[None, :]
        if SIZE % DEPTH:  # (masks that were made before the loop could not change their shape in it)
            left, right = left & (start + depth < SIZE)[None, :], right & (start + depth < SIZE)[:, None]
        a = tl.load(x + row[:, None] * SIZE + start + depth[None, :], mask=left, other=0)
        b = tl.load(weight + column[None, :] * SIZE + start + depth[:, None], mask=right, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    x_scale = tl.load(x_scales + row, mask=row < rows, other=0.0)
    w_scale = tl.load(w_scales + column, mask=column < columns, other=0.0)
    y = sums.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        y = y + tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    if ADD:
        y = tl.load(add + place, mask=inside, other=0.0) + y
    tl.store(out + place, y, mask=inside)
