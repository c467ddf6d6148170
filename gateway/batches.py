"""Which rows go to which expert, and how what comes back becomes one row again. Pure; no I/O.

Letters: T tokens of the step, D hidden size, K experts per token, M experts asked for, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.gate import Routing
from consilium.kernels import routing as kernel
from consilium.kernels.float_tile import BFLOAT16, FLOAT32


@dataclass(frozen=True, slots=True)
class ExpertBatches:
    """The (token, expert) pairs of a layer, sorted by expert, then by token."""

    rows: Tensor  # [T, D] the token rows that pairs point into: int8 with scales, or the model's dtype
    scales: Tensor | None  # [T] float32, only with int8 rows
    experts: NDArray[np.int64]  # [M] ascending
    offsets: NDArray[np.int64]  # [M + 1] where the pairs of each expert begin
    slots: NDArray[np.int64]  # [P] place t * K + k of each pair in the output
    tokens: NDArray[np.int64]  # [P] row of each pair
    places: int  # T * K; P is less when some pairs have been taken out
    prefill: bool = False  # some of the rows are of prompts

    @property
    def counts(self) -> NDArray[np.int64]:
        """Pairs of each expert [M]."""
        return self.offsets[1:] - self.offsets[:-1]


def group_by_expert(rows: Tensor, scales: Tensor | None, routing: Routing, *, prefill: bool = False) -> ExpertBatches:
    """Sort the pairs of ``routing`` by expert; pairs of one expert keep the order of their tokens."""
    ids = routing.ids.numpy().reshape(-1)  # [T * K]
    experts, offsets, slots, tokens = kernel.group(ids, routing.ids.shape[1])
    return ExpertBatches(rows, scales, experts, offsets, slots, tokens, ids.size, prefill)


def experts_of_tokens(batches: ExpertBatches) -> NDArray[np.int64]:
    """The experts [T, K] of every token, ascending; -1 for tokens that have been taken out."""
    experts = np.full(batches.places, -1, dtype=np.int64)
    experts[batches.slots] = np.repeat(batches.experts, batches.counts)
    return experts.reshape(len(batches.rows), -1)


def keep_tokens(batches: ExpertBatches, tokens: Sequence[int]) -> ExpertBatches:
    """Only the pairs of these tokens, and the experts that have any; slots and tokens mean the same as before."""
    kept = np.zeros(len(batches.rows), dtype=np.bool_)  # [T]
    kept[tokens] = True
    pairs = kept[batches.tokens]  # [P]
    owners = np.repeat(np.arange(len(batches.experts)), batches.counts)[pairs]
    positions, starts = np.unique(owners, return_index=True)
    return replace(
        batches,
        experts=batches.experts[positions],
        offsets=np.append(starts, owners.size),
        slots=batches.slots[pairs],
        tokens=batches.tokens[pairs],
    )


def scatter(rows: Tensor, slots: NDArray[np.int64], outputs: Tensor) -> None:
    """Put rows [P, D], float32 or bfloat16, into their ``slots`` [P] of outputs [T * K, D] float32."""
    form = FLOAT32 if rows.dtype is torch.float32 else BFLOAT16
    kernel.scatter(form, rows.data_ptr(), *rows.shape, slots.ctypes.data, outputs.data_ptr())


def combine(outputs: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of outputs [T * K, D] over K, one expert after the other in ascending id -> [T, D] float32."""
    tokens, top_k = routing.ids.shape
    weights, rows = routing.weights.contiguous(), outputs.contiguous()
    total = torch.empty(tokens, outputs.shape[1])
    kernel.weighted_sum(rows.data_ptr(), weights.data_ptr(), tokens, top_k, outputs.shape[1], total.data_ptr())
    return total
