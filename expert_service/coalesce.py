"""Several frames for one layer as one: what callers ask of the same expert is computed with one pass over its weights.

A row's bits do not depend on its neighbours, so nobody notices. Letters: P pairs, M experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilium.frames import Frame


def merge(frames: Sequence[Frame]) -> tuple[Frame, list[Tensor]]:
    """One frame with the pairs of all ``frames``, and for each of them where its pairs are in it: int64 [P]."""
    experts, indices, first = [], [], 0
    for frame in frames:
        experts.append(np.repeat(frame.experts, np.diff(frame.offsets)))
        indices.append(frame.indices.numpy() + np.int32(first))
        first += len(frame.rows)
    of_pairs = np.concatenate(experts)
    order = np.argsort(of_pairs, kind="stable")
    distinct, starts = np.unique(of_pairs[order], return_index=True)
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    scales = [frame.scales for frame in frames if frame.scales is not None]
    merged = Frame(
        layer=frames[0].layer,
        rows=torch.cat([frame.rows for frame in frames]),
        scales=torch.cat(scales) if scales else None,
        experts=distinct.tolist(),
        offsets=[*starts.tolist(), len(order)],
        indices=torch.from_numpy(np.concatenate(indices)[order]),
    )
    bounds = np.cumsum([len(each) for each in experts])[:-1]
    return merged, [torch.from_numpy(each) for each in np.split(places, bounds)]
