"""Which rows go to which expert, and how what comes back becomes one row again. Pure; no I/O.

Letters: T tokens of the step, D hidden size, K experts per token, M experts asked for, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    batches = ExpertBatches(rows, scales, experts, offsets, slots, tokens, ids.size, prefill)
    return batches if routing.kept is None else _keep(batches, routing.kept.numpy().reshape(-1)[slots])


def experts_of_tokens(batches: ExpertBatches) -> NDArray[np.int64]:
    """The experts [T, K] of every token, ascending; -1 for tokens that have been taken out."""
    experts = np.full(batches.places, -1, dtype=np.int64)
    experts[batches.slots] = np.repeat(batches.experts, batches.counts)
    return experts.reshape(len(batches.rows), -1)


def keep_tokens(batches: ExpertBatches, tokens: Sequence[int]) -> ExpertBatches:
    """Only the pairs of these tokens, and the experts that have any; slots and tokens mean the same as before."""
    kept = np.zeros(len(batches.rows), dtype=np.bool_)  # [T]
    kept[tokens] = True
    return _keep(batches, kept[batches.tokens])


def _keep(batches: ExpertBatches, pairs: NDArray[np.bool_]) -> ExpertBatches:
    """Only the ``pairs`` [P] that are true."""
    owners = np.repeat(np.arange(len(batches.experts)), batches.counts)[pairs]
    positions, starts = np.unique(owners, return_index=True)
    return replace(
        batches,
        experts=batches.experts[positions],
        offsets=np.append(starts, owners.size),
        slots=batches.slots[pairs],
        tokens=batches.tokens[pairs],
    )


class ExpertOutputs:
    """The output rows of a layer, wherever they lie: one for each of T * K places, zeros where there is none."""

    def __init__(self, places: int, hidden_size: int, dtype: torch.dtype) -> None:
        """``dtype`` is that of all rows: float32 or bfloat16."""
        self.hidden_size, self.dtype = hidden_size, dtype
        self.addresses = np.zeros(places, np.int64)
        self.left_out: NDArray[np.int64] | None = None  # slots whose experts nobody holds
        self.stood_in: set[int] = set()  # rows for which something else was done because nobody held an expert
        self._memory: list[Tensor] = []  # that the rows lie in
        self._releases: list[Callable[[], None]] = []

    def place(self, rows: Tensor, slots: NDArray[np.int64], release: Callable[[], None] | None = None) -> None:
        """Rows [P, D] are those of ``slots`` [P]; ``release`` is called when nobody needs them any more."""
        rows = rows.contiguous()
        self._memory.append(rows)
        if release is not None:
            self._releases.append(release)
        size = self.hidden_size * rows.itemsize
        begin = rows.data_ptr()
        self.addresses[slots] = np.arange(begin, begin + len(slots) * size, size)

    def drop(self, slots: NDArray[np.int64]) -> None:
        """There is no row for these."""
        self.addresses[slots] = 0

    def leave_out(self, slots: NDArray[np.int64]) -> None:
        """There is no row for these, and the other experts of their tokens make up for them (:func:`renormalised`)."""
        self.left_out = slots if self.left_out is None else np.concatenate([self.left_out, slots])

    def rows(self, slots: NDArray[np.int64]) -> Tensor:
        """A copy of the rows of ``slots`` [P]: [P, D]."""
        found = torch.empty(len(slots), self.hidden_size, dtype=self.dtype)
        addresses = self.addresses[slots]
        size = self.hidden_size * found.itemsize
        kernel.gather(addresses.ctypes.data, len(addresses), size, found.data_ptr())
        return found

    def release(self) -> None:
        """Nobody needs the rows any more."""
        releases, self._releases, self._memory = self._releases, [], []
        for release in releases:
            release()


def combine(outputs: ExpertOutputs, routing: Routing) -> Tensor:
    """Weighted sum over K, one expert after the other in ascending id -> [T, D] float32."""
    tokens, top_k = routing.ids.shape
    weights = routing.weights.contiguous()
    total = torch.empty(tokens, outputs.hidden_size)
    form = FLOAT32 if outputs.dtype is torch.float32 else BFLOAT16
    places = outputs.addresses.ctypes.data, weights.data_ptr()
    kernel.weighted_sum(form, *places, tokens, top_k, outputs.hidden_size, total.data_ptr())
    return total


def renormalised(routing: Routing, left_out: NDArray[np.int64]) -> tuple[Routing, list[int]]:
    """Weights that are 0 for slots ``left_out``, and sum up to the same for each token; and tokens with none left."""
    weights = routing.weights.clone()  # [T, K]
    weights.view(-1)[torch.from_numpy(left_out)] = 0
    whole, left = routing.weights.sum(dim=1), weights.sum(dim=1)  # [T]
    factors = torch.where(left > 0, whole / left, torch.zeros(()))
    changed = np.unique(left_out // routing.ids.shape[1])
    for row in changed:  # the others keep their bits
        weights[row] *= factors[row]
    return Routing(routing.ids, weights), [int(row) for row in changed if not left[row] > 0]
