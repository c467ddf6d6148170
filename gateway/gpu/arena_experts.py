"""The experts of workers on this machine's GPUs, reached without the host: rows and outputs lie in an arena.

Letters: T rows of the step, D hidden size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gateway.batch import StepRows
from gateway.device_hop import DeviceHop
from gateway.gpu.graphs import Graphs
from gateway.gpu.layer import Routed


class ArenaExperts:
    """One arena as the expert half of every layer, with the graphs that were recorded for it."""

    awaits = False

    def __init__(self, hop: DeviceHop, layers: Sequence[int], device: torch.device) -> None:
        """``layers`` are those with experts, ascending."""
        self.hop, self.graphs = hop, Graphs(device)
        self._numbers = {layer: number for number, layer in enumerate(layers)}

    def takes(self, batch: StepRows) -> bool:
        """Whether there is room for its rows, and all of them are waited for."""
        return len(batch.tokens) <= self.hop.arena.shape.tokens and not batch.failures

    async def forward(self, layer: int, routed: Routed, batch: StepRows) -> tuple[Tensor, Tensor]:  # noqa: ARG002 (the protocol's; a step fails as a whole)
        """Output rows [T * K, D] of all T rows, also of those that fill up a graph."""
        arena, (rows, top_k) = self.hop.arena, routed.ids.shape
        arena.rows[:rows].copy_(routed.rows.values)
        arena.scales[:rows].copy_(routed.rows.scales)
        arena.ids[:rows].copy_(routed.ids)
        self.hop.exchange(self._numbers[layer])
        return arena.outputs[: rows * top_k], routed.weights
