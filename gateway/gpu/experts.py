"""The expert half of a layer: rows and experts are on the device, and so are the outputs to be.

Letters: T rows of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from consilium.gate import Routing
from consilium.kernels import routing as kernel
from consilium.quantization import Quantized
from gateway.batch import StepRows
from gateway.batches import ExpertOutputs, group_by_expert, keep_tokens
from gateway.gpu.layer import Routed
from gateway.moe_layer import stood_in
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource


class ExpertHalf(Protocol):
    """Where the outputs of a layer's experts come from."""

    @property
    def awaits(self) -> bool:
        """Whether the host has to do with it: else it only launches, and may be part of a graph."""
        ...

    async def forward(self, layer: int, routed: Routed, batch: StepRows) -> tuple[Tensor, Tensor]:
        """Output rows [T * K, D], zeros where there is none, and the weights [T, K] to add them up with.

        Rows of the step that have no valid result are noted in the batch.
        """
        ...


class DispatchedExperts:
    """Experts of workers, reached by the dispatcher: rows go by way of this host's memory."""

    awaits = True

    def __init__(self, source: ExpertSource, clock: StageClock) -> None:
        self._source, self._clock = source, clock

    async def forward(self, layer: int, routed: Routed, batch: StepRows) -> tuple[Tensor, Tensor]:
        rows = len(batch.tokens)  # without those that fill up a graph
        device = routed.ids.device
        there = (*routed.rows, routed.ids, routed.weights)
        values, scales, ids, weights = (each[:rows].to("cpu", non_blocking=True) for each in there)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        self._clock.mark("gate")
        routing = Routing(ids.long(), weights)
        batches = group_by_expert(values, scales, routing, prefill=batch.prefill)
        if batch.failures:
            batches = keep_tokens(batches, batch.live_rows())
        self._clock.mark("group")
        outputs, failures = await self._source.dispatch(layer, batches)
        batch.failures.update(failures)
        if outputs.stood_in:
            routing = stood_in(layer, outputs, routing, batch)
        found = _gather(outputs, pinned=device.type == "cuda")
        outputs.release()
        self._clock.mark("combine")
        return found.to(device, non_blocking=True), routing.weights.to(device, non_blocking=True)


def _gather(outputs: ExpertOutputs, *, pinned: bool) -> Tensor:
    """All rows [T * K, D], one after the other; zeros where there is none."""
    found = torch.empty(len(outputs.addresses), outputs.hidden_size, dtype=outputs.dtype, pin_memory=pinned)
    row = outputs.hidden_size * found.itemsize
    kernel.gather(outputs.addresses.ctypes.data, len(found), row, found.data_ptr())
    return found
