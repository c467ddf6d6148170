"""How many rows every expert was asked for, counted on the device, where the host has no part in a layer.

Letters: L layers, E experts in a layer, T tokens of a step, K experts of a token.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from consilium.gpu.jit import jit_for_any, power_of_two
from consilium.gpu.sort import CHUNK, LEAST_BINS, count_pairs


class Tally:
    """Counts that only grow; whoever takes them gets what is new."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self._counts = torch.zeros(2, layers, experts, dtype=torch.int64, device=device)  # rows; steps with any
        self._taken = np.zeros(self._counts.shape, np.int64)

    def add(self, ids: Tensor, tokens: Tensor) -> None:
        """Launch, once for all layers of a step: ids int32 [L, T, K], of which the first ``tokens`` int32 [1] count."""
        _, layers, experts = self._counts.shape
        bins = max(LEAST_BINS, power_of_two(experts))
        numbers = ids.stride(0), ids.shape[2], experts, bins, CHUNK
        _add[(layers,)](ids, tokens, self._counts[0], self._counts[1], *numbers)

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Since the last time, [L, E] each: rows, and steps in which an expert had any. Waits for the device."""
        counts = self._counts.cpu().numpy()
        rows, steps = counts - self._taken
        self._taken = counts.copy()
        return rows, steps


@jit_for_any("stride", "tokens")
def _add(
    ids: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    steps: tl.tensor,
    stride: tl.tensor,
    PER_TOKEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program for each layer."""
    layer = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts = count_pairs(ids + layer * stride, tl.load(tokens) * PER_TOKEN, EXPERTS, BINS, CHUNK)
    place, known = layer * EXPERTS + bins, bins < EXPERTS
    tl.store(rows + place, tl.load(rows + place, mask=known) + counts, mask=known)
    tl.store(steps + place, tl.load(steps + place, mask=known) + (counts > 0).to(tl.int64), mask=known)
