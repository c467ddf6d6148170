"""The next token from a row of logits, in one fixed order, so that a seed gives the same token on every CPU.

For logits x [V] and a temperature t, in float32:
    y[i] = (x[i] - largest x) / t          e[i] = exp(y[i])            exp as kernels.arithmetic defines it
    min_p leaves out whose e is below it (the likeliest has 1), then top_k all but the first k by (y, lowest id), then
    top_p all that come after so many of these, in the same order, as hold that share of their total
    total = blocks of 512, each 16 sums of the e with the same i mod 16, in order; these in order; then the blocks'
The token is the first at which the sum, in order of ids, passes a uniform number times the total. Sums are in float64.

Letters: S rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import INFINITY_BITS, SIGN_OFF, ZERO, as_int, exp
from consilium.kernels.compiler import floats, kernel, longs
from consilium.kernels.float_tile import LANES
from consilium.kernels.sharing import done, meet, take

BLOCK = 512
LOWEST = np.float32(-np.inf)
BINS, WIDTH = 4 * 88, np.float32(4)  # of a histogram of -y, in quarters; exp is 0 below -88


@kernel
def largest(x: int, rows: int, size: int, ids: int, sharer: Any) -> Any:
    """int64 [S] at ``ids``: where the largest number of each row of float32 x [S, V] is; -1 where one is not finite."""
    found = longs(ids, rows)
    row = take(sharer, rows)
    while row >= 0:
        numbers = floats(x + 4 * row * size, size)
        found[row] = _largest(numbers) if _finite(numbers) else -1
        done(sharer)
        row = take(sharer, rows)
    return meet(sharer, rows)


@kernel
def draw(places: Any, size: int, limits: Any, top_k: Any, uniform: Any, ids: int, sharer: Any) -> Any:
    """int64 [S] at ``ids``: the token of each row of logits, float32 [V] at the addresses ``places`` int64 [S].

    ``limits`` float32 [S, 3] are temperature (0 takes the likeliest), min_p and top_p; ``top_k`` int64 [S] is V or more
    for no limit; ``uniform`` float64 [S] are the random numbers in [0, 1).
    """
    rows = places.shape[0]
    found = longs(ids, rows)
    row = take(sharer, rows)
    while row >= 0:
        logits = floats(places[row], size)
        if limits[row, 0] == ZERO:
            found[row] = _largest(logits)
        else:
            found[row] = _draw(logits, limits[row], top_k[row], uniform[row])
        done(sharer)
        row = take(sharer, rows)
    return meet(sharer, rows)


@kernel
def likeliest(x: int, size: int, count: int, ids: int) -> None:
    """int64 [count] at ``ids``: where the largest of the numbers float32 [V] at ``x`` are, in descending order."""
    row, found = floats(x, size), longs(ids, count)
    kept = 0
    for i in range(size):
        if kept == count and not row[i] > row[found[count - 1]]:
            continue
        kept = min(kept + 1, count)
        place = kept - 1
        while place > 0 and row[i] > row[found[place - 1]]:
            found[place] = found[place - 1]
            place -= 1
        found[place] = i


@kernel
def _finite(row):  # type: ignore[no-untyped-def]
    odd = np.int32(0)
    for i in range(row.shape[0]):
        odd |= np.int32((as_int(row[i]) & SIGN_OFF) >= INFINITY_BITS)
    return odd == 0


@kernel
def _largest(row):  # type: ignore[no-untyped-def]
    """The lowest id of the largest number; 0 where all are minus infinity."""
    best, start = LOWEST, 0
    lanes = np.empty(LANES, np.float32)
    whole = row.shape[0] // LANES * LANES
    for first in range(0, whole, BLOCK):
        lanes[:] = LOWEST
        for place in range(first, min(first + BLOCK, whole), LANES):
            part = row[place : place + LANES]
            for lane in range(LANES):
                lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
        for lane in range(LANES):
            if lanes[lane] > best:
                best, start = lanes[lane], first
    for i in range(whole, row.shape[0]):
        if row[i] > best:
            best, start = row[i], i
    while row[start] != best:
        start += 1
    return start


@kernel
def _draw(logits, limits, top_k, uniform):  # type: ignore[no-untyped-def]
    size = logits.shape[0]
    temperature, min_p, top_p = limits[0], limits[1], limits[2]
    largest = logits[_largest(logits)]
    y, e = np.empty(size, np.float32), np.empty(size, np.float32)
    for i in range(size):
        y[i] = (logits[i] - largest) / temperature
        e[i] = exp(y[i])
    if min_p > ZERO:
        for i in range(size):
            e[i] = ZERO if e[i] < min_p else e[i]
    if top_k < size or top_p < np.float32(1):
        _restrict(y, e, top_k, np.float64(top_p))
    return _pick(e, uniform)


@kernel
def _pick(e, uniform):  # type: ignore[no-untyped-def]
    """The id where the running total of ``e`` passes its share ``uniform``."""
    sums = _sums(e)
    before, block, last = 0.0, 0, sums.shape[0] - 1
    total = 0.0
    for each in sums:
        total += each
    threshold = uniform * total
    while block < last and before + sums[block] <= threshold:
        before += sums[block]
        block += 1
    chosen = -1
    for i in range(block * BLOCK, min(e.shape[0], (block + 1) * BLOCK)):
        if e[i] > ZERO:
            chosen = i
            before += np.float64(e[i])
            if before > threshold:
                break
    if chosen < 0:  # rounding has put the threshold past the end of the sum
        chosen = e.shape[0] - 1
        while chosen > 0 and e[chosen] <= ZERO:
            chosen -= 1
    return chosen


@kernel
def _sums(e):  # type: ignore[no-untyped-def]
    """float64 totals of each block."""
    size = e.shape[0]
    sums = np.zeros((size + BLOCK - 1) // BLOCK, np.float64)
    lanes = np.empty(LANES, np.float64)
    for block in range(sums.shape[0]):
        lanes[:] = 0.0
        first, stop = block * BLOCK, min(size, (block + 1) * BLOCK)
        whole = first + (stop - first) // LANES * LANES
        for place in range(first, whole, LANES):
            part = e[place : place + LANES]
            for lane in range(LANES):
                lanes[lane] += np.float64(part[lane])
        for i in range(whole, stop):
            lanes[i - whole] += np.float64(e[i])
        for lane in range(LANES):
            sums[block] += lanes[lane]
    return sums


@kernel
def _restrict(y, e, top_k, top_p):  # type: ignore[no-untyped-def]
    """Make e 0 outside of top_k and top_p; only so many of the likeliest are ranked as it takes."""
    everything = 0.0
    for each in _sums(e):
        everything += each
    bound = _bound(y, e, top_k, top_p * everything)
    ranked = _ranked(y, e, bound)
    stop, enough = _cut(e, ranked, top_k, top_p, everything)
    if not enough and bound > LOWEST:
        ranked = _ranked(y, e, LOWEST)
        stop, enough = _cut(e, ranked, top_k, top_p, everything)
    kept = ranked[:stop]
    weights = e[kept]
    e[:] = ZERO
    for each in range(stop):
        e[kept[each]] = weights[each]


@kernel
def _bound(y, e, top_k, share):  # type: ignore[no-untyped-def]
    """A y above which there are, but for rounding, top_k tokens, or without a top_k such a ``share`` of the total."""
    counts, held = np.zeros(BINS, np.int64), np.zeros(BINS, np.float64)
    for i in range(y.shape[0]):
        if e[i] > ZERO:
            place = min(int(-y[i] * WIDTH), BINS - 1)
            counts[place] += 1
            held[place] += np.float64(e[i])
    count, total = 0, 0.0
    for place in range(BINS - 1):
        count, total = count + counts[place], total + held[place]
        if count >= top_k or (top_k >= y.shape[0] and total > share):
            return -np.float32(place + 1) / WIDTH
    return LOWEST


@kernel
def _cut(e, ranked, top_k, top_p, everything):  # type: ignore[no-untyped-def]
    """How many of the ranked ids are kept, and whether these are enough to tell."""
    size = e.shape[0]
    stop, total = min(top_k, ranked.shape[0]), everything
    enough = ranked.shape[0] >= top_k
    if top_k < size:
        total = 0.0
        for rank in range(stop):
            total += np.float64(e[ranked[rank]])
    if top_p < 1.0:
        held, rank = 0.0, 0
        while rank < stop and held < top_p * total:
            held += np.float64(e[ranked[rank]])
            rank += 1
        enough |= top_k >= size and held >= top_p * total
        stop = max(rank, min(1, stop))
    return stop, enough


@kernel
def _ranked(y, e, bound):  # type: ignore[no-untyped-def]
    """The ids with a chance whose y is at least ``bound``: by y, the largest first, then by id."""
    count = 0
    for i in range(y.shape[0]):
        count += e[i] > ZERO and y[i] >= bound
    ids, keys = np.empty(count, np.int64), np.empty(count, np.float32)
    count = 0
    for i in range(y.shape[0]):
        if e[i] > ZERO and y[i] >= bound:
            ids[count], keys[count] = i, -y[i]
            count += 1
    return ids[np.argsort(keys, kind="mergesort")]
