"""The expert half of a layer: rows and experts are on the device, and so are the outputs to be.

Letters: T rows of the step, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import ConfigError
from consilium.experts import ExpertWeights
from consilium.gate import Routing
from consilium.gpu.experts import ExpertForm, compute, form_of, table_of
from consilium.gpu.sort import sort_pairs
from consilium.gpu.tiling import batch_of, nearest
from consilium.gpu.tuned import tilings_for
from consilium.gpu.upload import Uploader
from consilium.int8_experts import prepare_int8
from consilium.kernels import routing as kernel
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


class OwnExperts:
    """Every expert of the model on this device: only launches, nothing that the host waits for."""

    awaits = False

    def __init__(self, form: ExpertForm, layers: Mapping[int, Sequence[ExpertWeights]], device: torch.device) -> None:
        """``layers`` has the experts of each layer that routes, on the device."""
        self._form, self._held = form, layers  # which the tables have the addresses of
        self._tables = {layer: table_of(form, experts).to(device) for layer, experts in layers.items()}
        self._tilings = tilings_for(form, device)

    async def forward(self, layer: int, routed: Routed, batch: StepRows) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (the protocol's; nothing fails)
        """Output rows [T * K, D] of all T rows, also of those that fill up a graph."""
        table, pairs = self._tables[layer], routed.ids.numel()
        tiling = nearest(self._tilings, batch_of(pairs, len(table)))
        groups = sort_pairs(routed.ids, table, tiling.block_m)
        out = torch.empty(pairs, self._form.hidden_size, dtype=self._form.replies, device=routed.ids.device)
        compute(self._form, tiling, table, groups, *routed.rows, out)
        return out, routed.weights


def load_experts(checkpoint: Checkpoint, device: torch.device) -> OwnExperts:
    """All experts of a checkpoint in int8. Raises CheckpointError, and ConfigError where the memory does not do."""
    uploader, config = Uploader(device), checkpoint.config
    try:
        layers = {
            layer: [uploader.upload(prepare_int8(checkpoint.expert(layer, each))) for each in range(config.num_experts)]
            for layer in config.expert_layers()
        }
    except torch.OutOfMemoryError:
        raise ConfigError(
            "gateway.local_experts: the experts do not fit the GPU's memory; leave it out, and let workers hold them"
        ) from None
    one = next(iter(layers.values()))[0]
    return OwnExperts(form_of(one, torch.int8, torch.bfloat16), layers, device)


def _gather(outputs: ExpertOutputs, *, pinned: bool) -> Tensor:
    """All rows [T * K, D], one after the other; zeros where there is none."""
    found = torch.empty(len(outputs.addresses), outputs.hidden_size, dtype=outputs.dtype, pin_memory=pinned)
    row = outputs.hidden_size * found.itemsize
    kernel.gather(outputs.addresses.ctypes.data, len(found), row, found.data_ptr())
    return found
