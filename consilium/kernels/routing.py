"""The bookkeeping around the experts of a layer: which rows go where, and the sum of what comes back.

Letters: T tokens, K experts per token, E experts, M experts asked for, P pairs (T · K, or less), D hidden size,
U distinct tokens of a frame.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import from_bfloat16
from consilium.kernels.compiler import floats, halves, kernel, longs


@kernel
def group(ids: Any, top_k: int) -> Any:
    """The pairs of ids int64 [P] sorted by expert, then by token.

    Returns experts [M], offsets [M + 1], slots [P] and tokens [P], as gateway.batches.ExpertBatches has them.
    """
    largest = 0
    for expert in ids:
        largest = max(largest, expert)
    places = np.zeros(largest + 2, np.int64)
    for expert in ids:
        places[expert + 1] += 1
    asked = 0
    for expert in range(largest + 1):
        asked += places[expert + 1] > 0
    experts, offsets = np.empty(asked, np.int64), np.empty(asked + 1, np.int64)
    found = 0
    for expert in range(largest + 1):
        if places[expert + 1] > 0:
            experts[found], offsets[found] = expert, places[expert]
            found += 1
        places[expert + 1] += places[expert]
    offsets[asked] = ids.shape[0]
    slots, tokens = np.empty(ids.shape[0], np.int64), np.empty(ids.shape[0], np.int64)
    for slot in range(ids.shape[0]):
        place = places[ids[slot]]
        places[ids[slot]] += 1
        slots[place], tokens[place] = slot, slot // top_k
    return experts, offsets, slots, tokens


@kernel
def select(offsets: Any, tokens: Any, positions: Any, rows: int) -> Any:
    """What a frame for the experts at ``positions`` has, of all the pairs of T = ``rows`` tokens.

    Its pairs [P'] among all, its distinct tokens [U] ascending, offsets [len(positions) + 1] and indices int32 [P'].
    """
    count = 0
    for position in positions:
        count += offsets[position + 1] - offsets[position]
    own, pairs = np.empty(positions.shape[0] + 1, np.int64), np.empty(count, np.int64)
    places = np.full(rows, -1, np.int64)
    own[0], found = 0, 0
    for each in range(positions.shape[0]):
        for pair in range(offsets[positions[each]], offsets[positions[each] + 1]):
            pairs[found] = pair
            places[tokens[pair]] = 0
            found += 1
        own[each + 1] = found
    distinct = 0
    for token in range(rows):
        if places[token] == 0:
            places[token] = distinct
            distinct += 1
    chosen, indices = np.empty(distinct, np.int64), np.empty(count, np.int32)
    for token in range(rows):
        if places[token] >= 0:
            chosen[places[token]] = token
    for pair in range(count):
        indices[pair] = places[tokens[pairs[pair]]]
    return pairs, chosen, own, indices


@kernel
def owned(owners: Any, experts: Any, workers: int) -> Any:
    """Who computes the ``experts`` [M] when owners[expert] is the only worker that holds it.

    Their positions [M], worker by worker, and starts [workers + 1], where those of each worker begin. Both are empty
    where an expert has no owner.
    """
    starts = np.zeros(workers + 1, np.int64)
    for expert in experts:
        if expert >= owners.shape[0] or owners[expert] < 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        starts[owners[expert] + 1] += 1
    for worker in range(workers):
        starts[worker + 1] += starts[worker]
    found, positions = starts.copy(), np.empty(experts.shape[0], np.int64)
    for position in range(experts.shape[0]):
        owner = owners[experts[position]]
        positions[found[owner]] = position
        found[owner] += 1
    return positions, starts


@kernel
def in_order(experts: Any, offsets: Any, indices: Any, rows: int) -> bool:
    """Whether a frame of so many rows is one: experts int64 [M], offsets int64 [M + 1], indices int32 [P]."""
    asked = experts.shape[0]
    if offsets.shape[0] != asked + 1 or offsets[0] != 0 or offsets[asked] != indices.shape[0]:
        return False
    for each in range(asked):
        if each > 0 and experts[each - 1] >= experts[each]:
            return False
        if not 0 <= offsets[each + 1] - offsets[each] <= rows:
            return False
    outside = 0
    for index in indices:
        outside += index < 0 or index >= rows
    return outside == 0


@kernel
def scatter(form: Any, rows: int, count: int, size: int, slots: int, out: int) -> None:
    """Row i of ``rows`` [P, D], float32 or bfloat16, becomes row slots[i] of float32 ``out``."""
    places = longs(slots, count)
    for row in range(count):
        target = floats(out + 4 * places[row] * size, size)
        if len(form) == 0:
            source = floats(rows + 4 * row * size, size)
            for i in range(size):
                target[i] = source[i]
        else:
            bits = halves(rows + 2 * row * size, size)
            for i in range(size):
                target[i] = from_bfloat16(bits[i])


@kernel
def weighted_sum(rows: int, weights: int, tokens: int, top_k: int, size: int, out: int) -> None:
    """float32 [T, D] at ``out``: sum over k, in order, of rows [T, K, D] times weights [T, K]."""
    factors = floats(weights, tokens * top_k)
    for token in range(tokens):
        total = floats(out + 4 * token * size, size)
        for k in range(top_k):
            row, factor = floats(rows + 4 * (token * top_k + k) * size, size), factors[token * top_k + k]
            if k == 0:
                for i in range(size):
                    total[i] = row[i] * factor
            else:
                for i in range(size):
                    total[i] += row[i] * factor
