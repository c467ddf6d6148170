"""Experts computed in this process, straight from the checkpoint: no workers, no wire, the same arithmetic."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.experts import Arithmetic, ExpertWeights
from consilium.frames import Frame
from gateway.batches import ExpertBatches, ExpertOutputs

T = TypeVar("T")


class LocalExperts:
    """An ExpertSource that keeps every expert it was asked for."""

    def __init__(self, checkpoint: Checkpoint, arithmetic: Arithmetic) -> None:
        self._checkpoint, self._arithmetic = checkpoint, arithmetic
        self._held: dict[tuple[int, int], ExpertWeights] = {}

    @property
    def numerics_class(self) -> str:
        """As workers state it."""
        return self._arithmetic.numerics_class

    def rows(self, frame: Frame) -> Tensor:
        """What a worker answers to ``frame``: [P, D]. Raises CheckpointError."""
        experts = [self._expert(frame.layer, expert) for expert in frame.experts]
        return self._arithmetic.compute(experts, frame.offsets, frame.rows, frame.scales, indices=frame.indices)

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """The output rows of ``batches.slots``; nothing fails."""
        outputs = ExpertOutputs(batches.places, batches.rows.shape[1], self._arithmetic.reply_dtype)
        experts = [self._expert(layer, int(expert)) for expert in batches.experts]
        tokens = torch.from_numpy(batches.tokens)
        scales = None if batches.scales is None else batches.scales[tokens]
        found = self._arithmetic.compute(experts, batches.offsets.tolist(), batches.rows[tokens], scales)  # [P, D]
        outputs.place(found, batches.slots)
        return outputs, {}

    def _expert(self, layer: int, expert: int) -> ExpertWeights:
        if (layer, expert) not in self._held:
            self._held[layer, expert] = self._arithmetic.prepare(self._checkpoint.expert(layer, expert))
        return self._held[layer, expert]


def local_experts(config: Config, checkpoint: Checkpoint) -> LocalExperts:
    """Experts as this deployment's workers compute them. Raises ConsiliumError when this CPU has no right kernel."""
    sizes = checkpoint.config.hidden_size, checkpoint.config.expert_size
    return LocalExperts(checkpoint, find_arithmetic(config.quantization, config.reply_dtype, *sizes))


def run_now(coroutine: Coroutine[Any, None, T]) -> T:
    """The result of a coroutine that waits for nothing, as those over LocalExperts do."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a coroutine over local experts waited for something")
