"""Linear layers on the device: int8 by exact sums (consilium.gpu.linear). Letters: T rows, N outputs, K inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.gpu.linear import linear
from consilium.matrix import Stored
from consilium.quantization import Quantized
from gateway.linear import quantize_matrices


class DeviceLinear:
    """One matrix [N, K], with a bias [N] or without."""

    def __init__(self, matrices: Sequence[Stored], biases: Sequence[Tensor], device: torch.device) -> None:
        """For the outputs of several matrices, one after the other."""
        self._weight = Quantized(*(each.to(device) for each in quantize_matrices(matrices)))
        self._bias = torch.cat([each.float() for each in biases]).to(device) if biases else None

    def forward(self, x: Quantized) -> Tensor:
        """[T, K] -> [T, N] float32."""
        out = torch.empty(len(x.scales), len(self._weight.scales), device=x.scales.device)
        linear(x, self._weight, out, self._bias)
        return out

    def add(self, x: Quantized, to: Tensor) -> None:
        """``to`` [T, N] float32 += the outputs for x [T, K]."""
        linear(x, self._weight, to, self._bias, to)
