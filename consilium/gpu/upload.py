"""Experts on a device: what a worker or a gateway computes with, copied from the host as one block of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.experts import ExpertWeights
from consilium.gpu.staging import Buffer, pack, starts_of, views


class Uploader:
    """Used on one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._staged = device, Buffer(device, pinned=True)

    def upload(self, weights: ExpertWeights) -> ExpertWeights:
        """The same expert on the device, where it can be computed with at once.

        Its memory is free again with the last reference to it. Raises torch.OutOfMemoryError.
        """
        tensors = list(weights.tensors())
        starts = starts_of(tensors)
        block = torch.empty(starts[-1], dtype=torch.uint8, device=self._device)
        staged = self._staged.take(starts[-1])
        pack(tensors, staged, starts)
        block.copy_(staged)  # waits for the device: the staged bytes are overwritten by the next expert
        placed = iter(views(tensors, block, starts))

        def next_one(_: Tensor) -> Tensor:
            return next(placed)

        return weights.map(next_one)
