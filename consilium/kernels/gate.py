"""Softmax, then the K largest (consilium.gate.softmax_top_k) from the rows themselves, each row by itself.

Letters: T tokens, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import numpy as np

from consilium.kernels.arithmetic import NAN, ZERO, exp
from consilium.kernels.compiler import floats, kernel, longs
from consilium.kernels.float_tile import FLOAT32, LANES
from consilium.kernels.product import product


@kernel
def softmax_top_k(
    x: int,
    rows: int,
    hidden_size: int,
    gate: int,
    experts: int,
    top_k: int,
    normalize: int,
    scratch: int,
    ids: int,
    weights: int,
) -> None:
    """int64 [T, K] ascending at ``ids`` and float32 [T, K] at ``weights`` from float32 x [T, D].

    ``gate`` is the gate's matrix transposed, float32 [D, E], with E filled up to whole vectors of 16; ``scratch`` has
    room for [T, E] of those. Equal scores go to the lower id.
    """
    vectors = (experts + LANES - 1) // LANES
    width = 4 * LANES * vectors  # bytes of one row of logits
    product(
        FLOAT32, x, 4 * hidden_size, 4, rows, gate, width, 4 * LANES, vectors, hidden_size, scratch, width, 4 * LANES
    )
    for row in range(rows):
        scores = floats(scratch + row * width, experts)
        chosen, values = longs(ids + 8 * row * top_k, top_k), floats(weights + 4 * row * top_k, top_k)
        softmax(scores)
        choose(scores, chosen, values)
        if normalize:
            total = ZERO
            for k in range(top_k):
                total += values[k]
            for k in range(top_k):
                values[k] /= total


@kernel
def softmax(scores):  # type: ignore[no-untyped-def]
    """In place: exp(score - largest), divided by their sum in ascending id."""
    largest = scores[0]
    for score in scores:
        largest = score if score > largest else largest
    total = ZERO
    for expert in range(scores.shape[0]):
        scores[expert] = exp(scores[expert] - largest)
        total += scores[expert]
    for expert in range(scores.shape[0]):
        scores[expert] /= total


@kernel
def choose(scores, ids, values):  # type: ignore[no-untyped-def]
    """The K largest scores, ascending by id. Where NaNs leave fewer than K: the first K ids, as NaN."""
    for k in range(ids.shape[0]):
        found = _best(scores, ids[:k])
        if found < 0:
            for first in range(ids.shape[0]):
                ids[first], values[first] = first, NAN
            return
        place = k
        while place > 0 and ids[place - 1] > found:  # into its place among those chosen before
            ids[place] = ids[place - 1]
            place -= 1
        ids[place] = found
    for k in range(ids.shape[0]):
        values[k] = scores[ids[k]]


@kernel
def _best(scores, taken):  # type: ignore[no-untyped-def]
    """The lowest id of the largest score that is not taken; -1 when all that is left is NaN or -inf."""
    best, found = np.float32(-np.inf), -1
    for expert in range(scores.shape[0]):
        if scores[expert] > best:
            free = True
            for other in taken:
                free = free and other != expert
            if free:
                best, found = scores[expert], expert
    return found
