"""Moving tokens from experts that have too many to others. Letters: T tokens, E experts, K experts per token."""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.compiler import kernel


@kernel
def limit_load(ids: Any, kept: Any, order: Any, scores: Any, most: int) -> Any:
    """Change ids int64 [T, K], of which ``kept`` [T, K] count, so that no expert has more than ``most``.

    ``order`` int64 [T * K] are the pairs from the one to keep first to the last. Returns how many pairs went to another
    expert, the best by scores float32 [T, E] that has room and is not the token's already, and how many found none.
    """
    top_k = ids.shape[1]
    load, moved, over = np.zeros(scores.shape[1], np.int64), 0, 0
    waiting, count = np.empty(order.shape[0], np.int64), 0
    for pair in order:
        token, k = pair // top_k, pair % top_k
        if kept[token, k] and load[ids[token, k]] < most:
            load[ids[token, k]] += 1
        elif kept[token, k]:
            waiting[count] = pair
            count += 1
    for pair in waiting[:count]:
        token, k = pair // top_k, pair % top_k
        found = _next_best(scores[token], ids[token], load, most)
        if found >= 0:
            ids[token, k] = found
            moved += 1
        else:
            over += 1
        load[ids[token, k]] += 1
    return moved, over


@kernel
def _next_best(scores, own, load, most):  # type: ignore[no-untyped-def]
    found = -1
    for expert in range(scores.shape[0]):
        if load[expert] < most and (found < 0 or scores[expert] > scores[found]):
            free = True
            for other in own:
                free = free and other != expert
            if free:
                found = expert
    return found
