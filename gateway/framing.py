"""From the experts that a worker is to compute to frames, and large ones in pieces, each a call of its own.

So the worker computes one piece while the next travels and the rows of the last come back, and single tokens pass
between those of a prompt. A piece has whole experts, so nothing is computed in another way. What it costs is the token
rows, which travel with every piece that needs them, and a call.

Letters: P pairs of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from consilium.frames import Frame
from consilium.kernels.routing import select
from gateway.batches import ExpertBatches

PIECE_BYTES = 2**23  # of the rows that come back; bench/RESULTS.md has the measurement

T = TypeVar("T")


def build_frame(layer: int, batches: ExpertBatches, positions: NDArray[np.int64]) -> tuple[Frame, NDArray[np.int64]]:
    """The frame for the experts at ``positions``, each distinct token row once, and which pairs it covers [P]."""
    pairs, tokens, offsets, indices = select(batches.offsets, batches.tokens, positions, len(batches.rows))
    rows, scales = batches.rows, batches.scales
    if len(tokens) < len(rows):
        chosen = torch.from_numpy(tokens)
        rows, scales = rows[chosen], None if scales is None else scales[chosen]
    experts = batches.experts[positions].tolist()
    return Frame(layer, rows, scales, experts, offsets.tolist(), torch.from_numpy(indices), batches.prefill), pairs


def split(positions: NDArray[np.int64], counts: NDArray[np.int64], most: int) -> list[NDArray[np.int64]]:
    """``positions`` in parts of ``most`` pairs, and at most one expert more; ``counts`` has the pairs of each."""
    ends = np.cumsum(counts[positions])
    part = np.maximum(ends - 1, 0) // most  # that the last pair of each expert belongs to
    return np.split(positions, np.flatnonzero(np.diff(part)) + 1)


def in_turn(parts: Mapping[str, Sequence[T]]) -> list[tuple[str, T]]:
    """The first part of everyone, then the second ones, and so on."""
    longest = max(map(len, parts.values()), default=0)
    return [(name, each[turn]) for turn in range(longest) for name, each in parts.items() if turn < len(each)]
