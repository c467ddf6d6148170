"""The bookkeeping around the experts of a layer: which rows go where, and the sum of what comes back.

Letters: T tokens, K experts per token, E experts, M experts asked for, P pairs (T · K, or less), D hidden size,
U distinct tokens of a frame, W workers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import from_bfloat16
from consilium.kernels.compiler import bytes_, floats, halves, ints, kernel, longs


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
def assign(
    starts: Any, holders: Any, experts: Any, counts: Any, standing: Any, load: Any, unit: Any, costs: Any, turn: int
) -> Any:
    """Give each of the ``experts`` [M] with ``counts`` [M] rows to one of its holders.

    holders[starts[e]:starts[e + 1]] are the W workers that hold expert e. Of each worker: ``standing`` int8 (0 good, 1
    only where nobody better holds an expert, 2 never), ``load`` float64 (µs of work that it has), ``unit`` float64 (µs
    of a row). ``costs`` float64 [2]: reading an expert, in rows, and a frame more, in µs.

    Experts with one holder go there. The others, those with most rows first, go to the one of two holders that would
    be done earlier; ``turn`` says which two, and who wins a tie. A worker without a frame yet is put off by that frame.

    Their positions [M], worker by worker, ascending, and begins [W + 2], where those of each worker begin; at last
    those that nobody can take.
    """
    workers, asked = load.shape[0], experts.shape[0]
    reading, frame = costs[0], costs[1]
    owners, best, found = np.full(asked, workers, np.int64), np.empty(asked, np.int64), np.empty(asked, np.int64)
    busy, used = load.copy(), np.zeros(workers, np.bool_)
    for each in range(asked):
        best[each], found[each] = _best(starts, holders, experts[each], standing)
        if found[each] == 1:
            owners[each] = _holder(starts, holders, experts[each], standing, best[each], 0)
            used[owners[each]] = True
            busy[owners[each]] += unit[owners[each]] * (reading + counts[each])
    several = np.nonzero(found > 1)[0]
    if several.shape[0] > 1:
        several = several[np.argsort(-counts[several], kind="mergesort")]
    for place in several:
        expert, size = experts[place], reading + counts[place]
        first = (turn + expert) % found[place]
        second = (first + 1 + (turn // found[place]) % (found[place] - 1)) % found[place]
        one = _holder(starts, holders, expert, standing, best[place], first)
        other = _holder(starts, holders, expert, standing, best[place], second)
        early = busy[one] + unit[one] * size + frame * (not used[one])
        late = busy[other] + unit[other] * size + frame * (not used[other])
        chosen = other if late < early else one
        owners[place], used[chosen] = chosen, True
        busy[chosen] += unit[chosen] * size
    return _by_owner(owners, workers)


@kernel
def _best(starts: Any, holders: Any, expert: int, standing: Any) -> Any:
    """The best standing among an expert's holders, and how many have it; none where all are to get nothing."""
    best, found = 2, 0
    if expert + 1 < starts.shape[0]:
        for worker in holders[starts[expert] : starts[expert + 1]]:
            if standing[worker] < best:
                best, found = standing[worker], 0
            found += standing[worker] == best and best < 2
    return best, found


@kernel
def _holder(starts: Any, holders: Any, expert: int, standing: Any, wanted: int, number: int) -> int:
    """The holder with this number among those of the ``wanted`` standing."""
    for worker in holders[starts[expert] : starts[expert + 1]]:
        if standing[worker] == wanted:
            if number == 0:
                return int(worker)
            number -= 1
    return -1


@kernel
def _by_owner(owners: Any, workers: int) -> Any:
    """Positions [M] of ``owners`` [M] in 0..workers sorted by owner, and begins [workers + 2]."""
    begins = np.zeros(workers + 2, np.int64)  # of each owner
    for owner in owners:
        begins[owner + 1] += 1
    for owner in range(workers + 1):
        begins[owner + 1] += begins[owner]
    found, positions = begins.copy(), np.empty(owners.shape[0], np.int64)
    for position in range(owners.shape[0]):
        positions[found[owners[position]]] = position
        found[owners[position]] += 1
    return positions, begins


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
def all_finite(form: Any, address: int, count: int) -> bool:
    """Whether so many elements at ``address``, float32 or bfloat16 as ``form`` says, are all finite."""
    # What is not finite has all bits of its exponent set: so it is the largest, but for the sign.
    if len(form) == 0:
        long = np.int32(0)
        for bits in ints(address, count):
            long = max(long, np.int32(bits & np.int32(0x7FFFFFFF)))
        return bool(long < 0x7F800000)
    short = np.uint16(0)
    for half in halves(address, count):
        short = max(short, np.uint16(half & np.uint16(0x7FFF)))
    return bool(short < 0x7F80)


@kernel
def gather(addresses: int, count: int, row_bytes: int, out: int) -> None:
    """The rows at the ``addresses`` int64 [P], of so many bytes each, one after the other; zeros for address 0."""
    places = longs(addresses, count)
    for row in range(count):
        target = bytes_(out + row * row_bytes, row_bytes)
        if places[row] == 0:
            target[:] = 0
        else:
            source = bytes_(places[row], row_bytes)
            for i in range(row_bytes):
                target[i] = source[i]


@kernel
def weighted_sum(form: Any, addresses: int, weights: int, tokens: int, top_k: int, size: int, out: int) -> None:
    """float32 [T, D] at ``out``: sum over k, in order, of the rows at ``addresses`` [T, K] times weights [T, K].

    Rows are float32 or bfloat16, as ``form`` says; those at address 0 are zeros.
    """
    factors, places = floats(weights, tokens * top_k), longs(addresses, tokens * top_k)
    for token in range(tokens):
        total = floats(out + 4 * token * size, size)
        total[:] = np.float32(0)
        for pair in range(token * top_k, (token + 1) * top_k):
            factor = factors[pair]
            if places[pair] == 0:
                continue
            if len(form) == 0:
                row = floats(places[pair], size)
                for i in range(size):
                    total[i] += row[i] * factor
            else:
                bits = halves(places[pair], size)
                for i in range(size):
                    total[i] += from_bfloat16(bits[i]) * factor
