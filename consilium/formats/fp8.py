"""Float8 (e4m3fn) with a scale for each block, row or tensor: weight = stored · scale.

DeepSeek-V3 (DeepSeek-AI 2024) calls the scales `weight_scale_inv`, compressed-tensors `weight_scale`.
Letters: N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.formats.parts import FLOATS, find_part, sibling
from consilium.tensor_source import TensorSource

DTYPE = "F8_E4M3"


class Float8:
    """Matrices [N, K] stored under their own names."""

    def __init__(self, source: TensorSource, scale: str, block: tuple[int, int] | None) -> None:
        self._source, self._scale, self._block = source, scale, block

    def main(self, name: str) -> str:
        return name

    def holds(self, name: str) -> bool:
        return name in self._source and self._source.find(name).get_dtype() == DTYPE

    def shape(self, name: str) -> list[int]:
        return find_part(self._source, name, (DTYPE,), (None, None)).get_shape()

    def decode(self, name: str, index: int | None) -> Tensor:
        rows, columns = self.shape(name)
        weight: Tensor = self._source.find(name)[:].to(torch.float32)  # [N, K]
        scales = self._scales(sibling(name, self._scale), rows, columns)
        weight *= scales
        return weight if index is None else weight[index]

    def _scales(self, name: str, rows: int, columns: int) -> Tensor:
        """Float32, to be multiplied with [N, K]."""
        part = find_part(self._source, name, FLOATS)
        scales, shape = part[:].to(torch.float32, copy=True), part.get_shape()
        if scales.numel() == 1:
            return scales.view(1, 1)
        if shape in ([rows], [rows, 1]):
            return scales.view(rows, 1)
        if self._block is None or shape != [-(-rows // self._block[0]), -(-columns // self._block[1])]:
            raise CheckpointError(f"{self._source.place(name)}: scales of shape {shape} do not fit [{rows}, {columns}]")
        spread = scales.repeat_interleave(self._block[0], 0).repeat_interleave(self._block[1], 1)
        return spread[:rows, :columns]
