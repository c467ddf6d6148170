"""The gates that are more than a softmax (consilium.gate.route), from the logits, each row by itself in fixed order.

Letters: T tokens, E experts, K experts per token, G groups.
"""

from __future__ import annotations

import numpy as np

from consilium.kernels.arithmetic import ONE, ZERO, exp
from consilium.kernels.compiler import floats, kernel, longs
from consilium.kernels.float_tile import FLOAT32, LANES
from consilium.kernels.gate import choose, softmax
from consilium.kernels.product import product

SOFTMAX, SIGMOID, TOP_K_SOFTMAX, SPARSE_MIXER = range(4)
RULE = 7  # numbers a rule has; see ``route``
LOWEST = np.float32(-np.inf)


@kernel
def route(
    x: int,
    rows: int,
    hidden_size: int,
    gate: int,
    logit_bias: int,
    correction: int,
    rule: int,
    factors: int,
    scratch: int,
    ids: int,
    weights: int,
) -> None:
    """int64 [T, K] ascending at ``ids`` and float32 [T, K] at ``weights`` from float32 x [T, D].

    ``gate`` is the gate's matrix transposed, float32 [D, E], with E filled up to whole vectors of 16; ``logit_bias``
    and ``correction`` are addresses of float32 [E], or 0. ``rule`` int64 [7] has E, K, the scores (as above), whether
    weights are normalized, G, the groups that take part, and how many members make a group's score; ``factors``
    float32 [3] the least sum, the scaling, and sparsemixer's 2 · jitter. ``scratch`` has room for 2 [T, E], filled up.
    """
    own = longs(rule, RULE)
    experts = own[0]
    vectors = (experts + LANES - 1) // LANES
    width = 4 * LANES * vectors  # bytes of one row of logits
    product(
        FLOAT32, x, 4 * hidden_size, 4, rows, gate, width, 4 * LANES, vectors, hidden_size, scratch, width, 4 * LANES
    )
    for row in range(rows):
        scores, ranks = floats(scratch + row * width, experts), floats(scratch + (rows + row) * width, experts)
        if logit_bias != 0:
            _add(scores, floats(logit_bias, experts), scores)
        place = row * own[1]
        chosen, values = longs(ids + 8 * place, own[1]), floats(weights + 4 * place, own[1])
        _route_row(scores, ranks, correction, own, floats(factors, 3), chosen, values)


@kernel
def _route_row(scores, ranks, correction, rule, factors, chosen, values):  # type: ignore[no-untyped-def]
    kind = rule[2]
    if kind == SPARSE_MIXER:
        _sparse_mixer(scores, ranks, factors[2], chosen, values)
    else:
        _score(kind, scores)
        _rank(scores, correction, rule, ranks)
        choose(ranks, chosen, values)
        for k in range(values.shape[0]):
            values[k] = scores[chosen[k]] if values[k] == values[k] else values[k]
        if kind == TOP_K_SOFTMAX:
            softmax(values)
        elif rule[3] != 0:
            _normalize(values, factors[0])
    for k in range(values.shape[0]):
        values[k] *= factors[1]


@kernel
def _score(kind, scores):  # type: ignore[no-untyped-def]
    """In place, from logits."""
    if kind == SOFTMAX:
        softmax(scores)
    elif kind == SIGMOID:
        for expert in range(scores.shape[0]):
            scores[expert] = ONE / (ONE + exp(-scores[expert]))


@kernel
def _rank(scores, correction, rule, ranks):  # type: ignore[no-untyped-def]
    """What experts are chosen by."""
    ranks[:] = scores
    if correction != 0:
        _add(ranks, floats(correction, rule[0]), ranks)
    if rule[4] > 1:
        _limit_groups(ranks, rule[4], rule[5], rule[6])


@kernel
def _add(a, b, out):  # type: ignore[no-untyped-def]
    for i in range(out.shape[0]):
        out[i] = a[i] + b[i]


@kernel
def _normalize(values, least):  # type: ignore[no-untyped-def]
    total = ZERO
    for k in range(values.shape[0]):
        total += values[k]
    total = least if total < least else total
    for k in range(values.shape[0]):
        values[k] /= total


@kernel
def _limit_groups(ranks, groups, kept, members):  # type: ignore[no-untyped-def]
    """-inf outside of the ``kept`` best of the groups of neighbours; the lower group of equals."""
    size = ranks.shape[0] // groups
    best, free = np.empty(groups, np.float32), np.ones(groups, np.bool_)
    for group in range(groups):
        best[group] = _sum_of_best(ranks[group * size : (group + 1) * size], members)
    for _ in range(kept):
        found = -1
        for group in range(groups):
            if free[group] and (found < 0 or best[group] > best[found]):
                found = group
        free[found] = False
    for group in range(groups):
        if free[group]:
            ranks[group * size : (group + 1) * size] = LOWEST


@kernel
def _sum_of_best(ranks, members):  # type: ignore[no-untyped-def]
    """The ``members`` largest, added up from the largest on."""
    total, taken = ZERO, np.zeros(ranks.shape[0], np.bool_)
    for _ in range(members):
        found = -1
        for i in range(ranks.shape[0]):
            if not taken[i] and (found < 0 or ranks[i] > ranks[found]):
                found = i
        taken[found] = True
        total += ranks[found]
    return total


@kernel
def _sparse_mixer(logits, near, limit, ids, values):  # type: ignore[no-untyped-def]
    """Two experts, each weighed among those that are left and not much below it."""
    experts, first = logits.shape[0], -1
    weights = np.zeros(2, np.float32)
    found = np.zeros(2, np.int64)
    for k in range(2):
        best = -1
        for expert in range(experts):
            if expert != first and (best < 0 or logits[expert] > logits[best]):
                best = expert
        total = ZERO
        for expert in range(experts):
            size = max(abs(logits[expert]), logits[best])
            far = (logits[best] - logits[expert]) / size > limit or expert == first
            near[expert] = ZERO if far else exp(logits[expert] - logits[best])
            total += near[expert]
        found[k], weights[k], first = best, near[best] / total, best
    lower = 0 if found[0] < found[1] else 1
    ids[0], ids[1], values[0], values[1] = found[lower], found[1 - lower], weights[lower], weights[1 - lower]
