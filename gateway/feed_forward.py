"""FFNs that the gateway computes itself: of layers that do not route, and the shared experts of those that do.

Letters: T rows of the step, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint, ExpertTensors
from consilium.kernels.float_tile import FLOAT32, LANES
from consilium.kernels.product import product
from consilium.silu import exp, silu_and_multiply
from gateway.batch import Batch
from gateway.gate import by_columns
from gateway.linear import LinearMaker


class FeedForward:
    """down(SiLU(gate(x)) * up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, tensors: ExpertTensors, maker: LinearMaker) -> None:
        self._gate, self._up, self._down = (maker.make([each]) for each in (tensors.gate, tensors.up, tensors.down))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        hidden = silu_and_multiply(self._gate.forward(x).float(), self._up.forward(x).float())
        return self._down.forward(hidden.to(x.dtype))


class DenseLayer:
    """The FFN of a layer that does not route."""

    def __init__(self, checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> None:
        self._ffn = FeedForward(checkpoint.dense(layer), maker)

    async def forward(self, x: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002 (the protocol's; nothing can fail here)
        """[T, D] -> [T, D]."""
        return self._ffn.forward(x)


class SharedExperts:
    """The experts that every token goes to (Dai et al. 2024, "DeepSeekMoE"): as one FFN, here, for all tokens need it.

    Qwen2-MoE weighs their output by a gate of their own: sigmoid(x · w).
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, maker: LinearMaker) -> None:
        config, names = checkpoint.config, checkpoint.names
        self._ffn = FeedForward(checkpoint.shared(layer), maker)
        self._gate: Tensor | None = None  # [D, 16], the first column
        if config.shared_gate:
            name = names.shared_gate.format(layer=layer)
            self._gate = by_columns(checkpoint.tensor(name, (1, config.hidden_size)))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D] float32."""
        out = self._ffn.forward(x).float()
        return out if self._gate is None else out * self._weights(x.float().contiguous(), self._gate)

    def _weights(self, x: Tensor, gate: Tensor) -> Tensor:
        """[T, D] -> [T, 1]."""
        rows, size = x.shape
        scores, line = torch.empty(rows, LANES), 4 * LANES
        left, right = (x.data_ptr(), 4 * size, 4, rows), (gate.data_ptr(), line, line, 1, size)
        product(FLOAT32, *left, *right, scores.data_ptr(), line, line)
        return 1 / (1 + exp(-scores[:, :1]))
