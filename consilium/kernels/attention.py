"""Grouped-query attention (Ainslie et al. 2023) in one fixed order, over the contiguous cache of each sequence.

For a query at position p, over the positions s of its window, in float32:
    score[s] = (sum over the d elements, in order, of q · k[s]) · 1/sqrt(d)
    e[s]     = exp(score[s] - the largest score)                   exp as kernels.arithmetic defines it
    total    = sixteen sums, of the positions with the same s mod 16, each in order; then these added in order
Where a head has a sink (OpenAI 2025, gpt-oss), it is one more score that has no value: it counts for the largest one,
and its e is added to the total last.
    out      = (sum over s, in order, of e[s] · v[s]) / total
Positions are absolute, so a row's bits are the same as a row of a prompt, of any chunk of it, and as a decoding step.
Keys lie in blocks of 16 positions with the positions innermost, so that 16 scores are summed side by side.

Letters: T rows, H query heads, Hkv key-value heads, G = H / Hkv, d head size, dv that of values (most often d),
r how many elements are rotated (most often d).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import ONE, ZERO, exp, from_bfloat16, to_bfloat16
from consilium.kernels.compiler import floats, halves, kernel, longs
from consilium.kernels.float_tile import LANES
from consilium.kernels.norm import normalize
from consilium.kernels.product import product
from consilium.kernels.sharing import done, meet, take

BLOCK = 4  # queries of one head that share one pass over keys and values
SEGMENT = 9  # numbers a segment has; see ``attend``
NO_SINK = np.float32(-np.inf)
# Bytes from a query's sink to the next one's; numba would compile anew for numbers that it sees in the code.
NEXT_SINK, SAME_SINK = np.int64(4), np.int64(0)


@kernel
def prepare(x: Any, norm: int, epsilon: Any, cos: Any, sin: Any) -> None:
    """One query or key [d] in place: RMS norm with the weight at ``norm`` unless that is 0, then rotation by position.

    The pairs of rotary embedding (Su et al. 2021) are (i, i + r/2), i < r/2; ``cos`` and ``sin`` are [r/2].
    """
    if norm:
        normalize(x, floats(norm, x.shape[0]), epsilon, x)
    half = cos.shape[0]
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[i] + first * sin[i]


@kernel
def store(form: Any, key: Any, value: Any, keys: int, values: int, position: int) -> None:
    """Write one position, key [d] and value [dv], into keys [blocks, d, 16] and values [positions, dv] of one head."""
    size, value_size = key.shape[0], value.shape[0]
    first, place = (position // LANES) * size * LANES + position % LANES, position * value_size
    if len(form) == 0:
        to_keys, to_values = floats(keys, first + size * LANES), floats(values, place + value_size)
        for i in range(size):
            to_keys[first + i * LANES] = key[i]
        for i in range(value_size):
            to_values[place + i] = value[i]
    else:
        key_bits, value_bits = halves(keys, first + size * LANES), halves(values, place + value_size)
        for i in range(size):
            key_bits[first + i * LANES] = to_bfloat16(key[i])
        for i in range(value_size):
            value_bits[place + i] = to_bfloat16(value[i])


@kernel
def attend(
    form: Any,
    qkv: int,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int,
    rotated: int,
    norms: int,
    epsilon: Any,
    cos: int,
    sin: int,
    segments: int,
    count: int,
    layer: int,
    window: int,
    scratch: int,
    scratch_row: int,
    out: int,
    sharer: Any,
) -> Any:
    """Attention of every row of a step: float32 [T, H, dv] at ``out`` from qkv, which is changed.

    A row of qkv is queries [H, d], keys [Hkv, d] and values [Hkv, dv], one after the other.

    Threads share it out by key-value heads, of one sequence each, with the query heads that go with them.

    ``segments`` int64 [count, 9] has of each sequence: addresses of its keys and values, their bytes per layer (two)
    and per head (two), its first row in the step, how many it has, and the first one's position. ``norms`` is the
    address of three addresses: of the norms' weights for queries and keys, and of the heads' sinks [H] (0 for none);
    ``cos`` and ``sin`` are [T, r/2].
    ``window`` 0 is none. ``scratch`` holds for each thread max(4, G) rows of ``scratch_row`` bytes: a float for
    each position of the longest sequence, filled up to whole blocks.
    """
    table = longs(segments, count * SEGMENT)
    sizes = size, value_size, rotated
    step = qkv, heads, kv_heads, sizes, norms, epsilon, cos, sin, layer, window, out
    memory = scratch + sharer[1] * max(BLOCK, heads // kv_heads) * scratch_row, scratch_row
    block = take(sharer, count * kv_heads)
    while block >= 0:
        segment, head = block // kv_heads, block % kv_heads
        _attend_head(form, step, table[SEGMENT * segment : SEGMENT * (segment + 1)], head, memory)
        done(sharer)
        block = take(sharer, count * kv_heads)
    return meet(sharer, count * kv_heads)


@kernel
def _attend_head(form, of_step, own, head, memory):  # type: ignore[no-untyped-def]
    """One key-value head of the sequence that ``own`` describes."""
    qkv, heads, kv_heads, sizes, norms, epsilon, cos, sin, layer, window, out = of_step
    size, value_size, rotated = sizes
    weights = longs(norms, 3)
    width = (heads + kv_heads) * size + kv_heads * value_size  # floats of one row of qkv
    group = heads // kv_heads
    first, rows, position = own[6], own[7], own[8]
    keys = own[0] + layer * own[2] + head * own[4]
    values = own[1] + layer * own[3] + head * own[5]
    for row in range(rows):
        line = qkv + 4 * (first + row) * width
        turn_cos = floats(cos + 2 * (first + row) * rotated, rotated // 2)
        turn_sin = floats(sin + 2 * (first + row) * rotated, rotated // 2)
        for each in range(head * group, (head + 1) * group):
            prepare(floats(line + 4 * each * size, size), weights[0], epsilon, turn_cos, turn_sin)
        key = floats(line + 4 * (heads + head) * size, size)
        prepare(key, weights[1], epsilon, turn_cos, turn_sin)
        value = floats(line + 4 * ((heads + kv_heads) * size + head * value_size), value_size)
        store(form, key, value, keys, values, position + row)
    seen = (keys, values, size, value_size, window)
    queries = qkv + 4 * (first * width + head * group * size)
    place = out + 4 * (first * heads + head * group) * value_size
    sinks = weights[2] + 4 * head * group if weights[2] != 0 else weights[2]
    step = min(1, rows - 1)  # positions from one query to the next
    if rows == 1:  # the heads of the group side by side
        _attend(form, queries, 4 * size, group, position, step, seen, (sinks, NEXT_SINK), memory, place, 4 * value_size)
        return
    for each in range(group):
        for row in range(0, rows, BLOCK):
            left, target = queries + 4 * (row * width + each * size), place + 4 * (row * heads + each) * value_size
            block, line = min(BLOCK, rows - row), 4 * heads * value_size
            sink = (sinks + 4 * each if sinks != 0 else sinks, SAME_SINK)
            _attend(form, left, 4 * width, block, position + row, step, seen, sink, memory, target, line)


@kernel
def _attend(form, queries, query_row, count, position, step, cache, sinks, memory, out, out_row):  # type: ignore[no-untyped-def]
    """``count`` queries of one head: the first at ``position``, each next one ``step`` further.

    ``sinks`` is where the first one's sink lies (0 for none), and the bytes from there to the next one's.
    """
    keys, values, size, value_size, window = cache
    scores, scores_row = memory
    item = 4 if len(form) == 0 else 2
    line, block = item * LANES, item * LANES * size
    last = position + (count - 1) * step
    start = max(0, position + 1 - window) // LANES * LANES if window else 0
    seen, blocks = last + 1 - start, last // LANES - start // LANES + 1
    keys += start // LANES * block
    product(form, queries, query_row, 4, count, keys, line, block, blocks, size, scores, scores_row, 4 * LANES)
    totals = np.empty(count, np.float32)
    scale = ONE / np.sqrt(np.float32(size))
    for row in range(count):
        stop = position + row * step + 1 - start
        begin = max(0, stop - window) if window else 0
        sink = floats(sinks[0] + row * sinks[1], 1)[0] if sinks[0] != 0 else NO_SINK
        totals[row] = _exponentials(floats(scores + row * scores_row, seen), begin, stop, scale, sink)
    values += start * value_size * item
    vectors = value_size // LANES
    product(form, scores, scores_row, 4, count, values, item * value_size, line, vectors, seen, out, out_row, 4 * LANES)
    _last_columns(form, scores, scores_row, count, values, value_size, seen, out, out_row)
    for row in range(count):
        result = floats(out + row * out_row, value_size)
        for i in range(value_size):
            result[i] /= totals[row]


@kernel
def _exponentials(scores, begin, stop, scale, sink):  # type: ignore[no-untyped-def]
    """In place, 0 outside ``begin`` to ``stop``; returns their total. scores[0] is at a multiple of 16 positions."""
    scores[:begin] = ZERO
    scores[stop:] = ZERO
    seen = scores[begin:stop]  # loops from 0 over the whole of an array are what LLVM makes vectors of
    for s in range(seen.shape[0]):
        seen[s] *= scale
    largest = _largest(seen)
    largest = sink if sink > largest else largest
    for s in range(seen.shape[0]):
        seen[s] = exp(seen[s] - largest)
    lanes = np.zeros(LANES, np.float32)
    whole = stop // LANES
    for block in range(whole):
        row = scores[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += row[lane]
    for lane in range(stop - whole * LANES):
        lanes[lane] += scores[whole * LANES + lane]
    total = ZERO
    for lane in range(LANES):
        total += lanes[lane]
    return total + exp(sink - largest)  # zero, where there is none


@kernel
def _largest(scores):  # type: ignore[no-untyped-def]
    lanes = np.full(LANES, scores[0], np.float32)
    whole = scores.shape[0] // LANES
    for block in range(whole):
        row = scores[block * LANES : (block + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] = row[lane] if row[lane] > lanes[lane] else lanes[lane]
    largest = lanes[0]
    for lane in range(1, LANES):
        largest = lanes[lane] if lanes[lane] > largest else largest
    for s in range(whole * LANES, scores.shape[0]):
        largest = scores[s] if scores[s] > largest else largest
    return largest


@kernel
def _last_columns(form, scratch, scratch_row, count, values, size, seen, out, out_row):  # type: ignore[no-untyped-def]
    """The columns that fill no vector, where d is not a multiple of 16: the same sums one by one."""
    for row in range(count):
        weights, result = floats(scratch + row * scratch_row, seen), floats(out + row * out_row, size)
        for i in range(size // LANES * LANES, size):
            total = ZERO
            for s in range(seen):
                if len(form) == 0:
                    total += weights[s] * floats(values, seen * size)[s * size + i]
                else:
                    total += weights[s] * from_bfloat16(halves(values, seen * size)[s * size + i])
            result[i] = total
