"""All experts of a call in one kernel, for few rows each: down(SiLU(gate(x)) · up(x)), as consilium.experts has it.

Letters: P pairs, M experts, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from typing import Any

from consilium.kernels import grouped
from consilium.kernels.arithmetic import quantize_row, silu_and_multiply, to_bfloat16
from consilium.kernels.compiler import bytes_, floats, halves, ints, kernel, longs
from consilium.kernels.linear import BLOCK, multiply

# What weights are made of, by its type (see int8_tile): INT8, or int4 in groups of as many inputs as the tuple says.
Grouping = tuple[int, ...]
INT8: Grouping = ()

WEIGHTS = 6  # addresses an expert has: values and scales of gate, up and down


def scratch_bytes(hidden_size: int, expert_size: int) -> int:
    """Memory that ``compute`` needs for itself.

    Rows in a block's order, gate and up as floats, hidden rows as int8, and output rows that are still float32.
    """
    return BLOCK * (hidden_size + 4 + 4 * expert_size + 4 * expert_size + expert_size + 4 + 4 * hidden_size)


@kernel
def gather(rows: int, scales: int, indices: int, first: int, count: int, size: int, x: int, x_scales: int) -> None:
    """``count`` int8 rows [D] with their scales, at ``x`` and ``x_scales``: those at indices[first] and after it."""
    chosen, found = ints(indices, first + count), floats(x_scales, count)
    for each in range(count):
        row = chosen[first + each]
        found[each] = floats(scales + 4 * row, 1)[0]
        source, target = bytes_(rows + row * size, size), bytes_(x + each * size, size)
        for i in range(size):
            target[i] = source[i]


@kernel
def round_rows(rows: int, size: int, out: int) -> None:
    """bfloat16 [size] at ``out`` from float32 at ``rows``."""
    values, halved = floats(rows, size), halves(out, size)
    for i in range(size):
        halved[i] = to_bfloat16(values[i])


@kernel
def product(kind, grouping, x, x_scales, rows, w, w_scales, columns, size, out):  # type: ignore[no-untyped-def]
    """float32 [M, N] at ``out``: int8 x [M, K] and w [N, K] with their scales."""
    if len(grouping) == 0:
        multiply(kind, x, x_scales, rows, w, w_scales, columns, size, out, columns)
    else:
        grouped.multiply(kind, x, x_scales, rows, w, w_scales, columns, size, grouping[0], out, columns)


@kernel
def compute(
    kind: Any,
    grouping: Any,
    form: Any,
    weights: int,
    ranges: int,
    first: int,
    last: int,
    rows: int,
    scales: int,
    indices: int,
    hidden_size: int,
    expert_size: int,
    scratch: int,
    out: int,
) -> None:
    """Experts ``first`` to ``last`` of ``weights`` int64 [M], each the address of a table int64 [6].

    float32 or bfloat16 [P, D] at ``out``, as ``form`` says, from int8 rows [P, D] and scales [P], or, where ``indices``
    int32 [P] is not 0, from those of [U, D] and [U] that they point at. Expert i computes the rows from ranges[i, 0] to
    ranges[i, 1] (int64 [M, 2]).
    """
    tables, bounds = longs(weights, last), longs(ranges, last * 2)
    gate = scratch
    up = gate + 4 * BLOCK * expert_size
    hidden_scales = up + 4 * BLOCK * expert_size
    own_scales = hidden_scales + 4 * BLOCK
    hidden = own_scales + 4 * BLOCK
    own_rows = hidden + BLOCK * expert_size
    wide = own_rows + BLOCK * hidden_size
    for expert in range(first, last):
        own = longs(tables[expert], WEIGHTS)
        for start in range(bounds[2 * expert], bounds[2 * expert + 1], BLOCK):
            count = min(BLOCK, bounds[2 * expert + 1] - start)
            x, x_scales = rows + start * hidden_size, scales + 4 * start
            if indices != 0:
                x, x_scales = own_rows, own_scales
                gather(rows, scales, indices, start, count, hidden_size, x, x_scales)
            product(kind, grouping, x, x_scales, count, own[0], own[1], expert_size, hidden_size, gate)
            product(kind, grouping, x, x_scales, count, own[2], own[3], expert_size, hidden_size, up)
            found = floats(hidden_scales, count)
            for row in range(count):
                gate_row = floats(gate + 4 * row * expert_size, expert_size)
                silu_and_multiply(gate_row, floats(up + 4 * row * expert_size, expert_size), gate_row)
                found[row] = quantize_row(gate_row, bytes_(hidden + row * expert_size, expert_size))
            target = out + 4 * start * hidden_size if len(form) == 0 else wide
            product(kind, grouping, hidden, hidden_scales, count, own[4], own[5], hidden_size, expert_size, target)
            if len(form) != 0:
                round_rows(wide, count * hidden_size, out + 2 * start * hidden_size)
