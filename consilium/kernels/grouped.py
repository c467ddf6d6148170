"""The product of int8 rows with int4 weights in groups of inputs, as consilium.int4 defines it.

Letters: M rows, N output channels, K what is summed over, G groups of inputs, B = N / 16 blocks of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.compiler import bytes_, kernel
from consilium.kernels.int4_tile import CHANNELS, WORD, WORD_BYTES, tile_1, tile_2, tile_4
from consilium.kernels.sharing import done, meet, take

BLOCKS = 4  # of channels that a thread takes at once: some 5 µs of reading weights
HALF = np.int32(8)  # what a stored weight has too much


@kernel
def count_groups(size: int, group: int) -> int:
    """G: groups of ``group`` inputs, the last of which may have fewer."""
    return (size + group - 1) // group


@kernel
def group_starts(x: int, rows: int, size: int, group: int) -> Any:
    """int32 [M, G]: -8 times the sum of each group of int8 x [M, K]."""
    groups = count_groups(size, group)
    starts = np.empty((rows, groups), np.int32)
    for row in range(rows):
        for number in range(groups):
            first = number * group
            total = np.int32(0)
            for value in bytes_(x + row * size + first, min(group, size - first)):
                total = np.int32(total + value)
            starts[row, number] = np.int32(-HALF * total)
    return starts


@kernel
def multiply_blocks(
    kind: Any,
    x: int,
    x_scales: int,
    starts: Any,
    rows: int,
    w: int,
    w_scales: int,
    first: int,
    last: int,
    columns: int,
    size: int,
    group: int,
    out: int,
    stride: int,
) -> None:
    """The columns of blocks ``first`` to ``last`` of ``multiply``, with the rows' ``starts``."""
    words, groups = size // WORD, count_groups(size, group)
    for block in range(first, last):
        weights, scales = w + block * words * WORD_BYTES, w_scales + block * groups * WORD_BYTES
        count = min(CHANNELS, columns - block * CHANNELS)
        right = weights, scales, words, group // WORD
        row = 0
        while row < rows:
            left = x + row * size, size, x_scales + 4 * row, starts.ctypes.data + 4 * row * groups, 4 * groups
            target = out + 4 * (row * stride + block * CHANNELS), 4 * stride, count
            if row + 4 <= rows:
                tile_4(kind, *left, *right, *target)
                row += 4
            elif row + 2 <= rows:
                tile_2(kind, *left, *right, *target)
                row += 2
            else:
                tile_1(kind, *left, *right, *target)
                row += 1


@kernel
def multiply(kind, x, x_scales, rows, w, w_scales, columns, size, group, out, stride):  # type: ignore[no-untyped-def]
    """float32 [M, N] at ``out``, rows ``stride`` floats apart: int8 x [M, K] and int4 w [N, K] with their scales."""
    starts, blocks = group_starts(x, rows, size, group), count_blocks(columns)
    multiply_blocks(kind, x, x_scales, starts, rows, w, w_scales, 0, blocks, columns, size, group, out, stride)


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
    group: int,
    out: int,
    sharer: Any,
) -> None:
    """``multiply`` by several threads."""
    blocks = count_blocks(columns)
    shares = (blocks + BLOCKS - 1) // BLOCKS
    share = take(sharer, shares)
    if share >= 0:  # else it may be over, and x gone
        starts = group_starts(x, rows, size, group)
    while share >= 0:
        first, last = share * BLOCKS, min(blocks, (share + 1) * BLOCKS)
        multiply_blocks(kind, x, x_scales, starts, rows, w, w_scales, first, last, columns, size, group, out, columns)
        done(sharer)
        share = take(sharer, shares)
    meet(sharer, shares)


@kernel
def count_blocks(columns: int) -> int:
    """B: blocks of 16 channels, the last of which may have fewer."""
    return (columns + CHANNELS - 1) // CHANNELS
