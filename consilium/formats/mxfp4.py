"""MXFP4 (OCP Microscaling 1.0, 2023) as gpt-oss holds its experts: 32 numbers of 4 bits share a power of two.

Letters: E experts, N outputs, K inputs, B = K / 32 blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.formats.parts import find_part
from consilium.tensor_source import TensorSource

BLOCK = 32
# What the 16 codes of e2m1 stand for: a sign, two bits of exponent, one of mantissa.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = torch.tensor([*_HALF, *(-each for each in _HALF)])
BIAS, NAN = 127, 255  # of the scales' exponents; what stands for not a number


class Mxfp4:
    """Tensors [E, K, N] as X_blocks [E, N, B, 16] (two codes a byte, the low one first) and X_scales [E, N, B]."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def main(self, name: str) -> str:
        return f"{name}_blocks"

    def holds(self, name: str) -> bool:
        return self.main(name) in self._source

    def shape(self, name: str) -> list[int]:
        experts, outputs, blocks, _ = self._blocks(name)
        return [experts, blocks * BLOCK, outputs]

    def decode(self, name: str, index: int | None) -> Tensor:
        """float32 [E, K, N], or [K, N]."""
        experts, outputs, blocks, _ = self._blocks(name)
        scales = find_part(self._source, f"{name}_scales", ("U8",), (experts, outputs, blocks))
        every = slice(None) if index is None else index
        exponents = scales[every].to(torch.int32)  # [..., N, B]
        if (exponents == NAN).any():
            raise CheckpointError(f"{self._source.place(f'{name}_scales')}: a scale is not a number; download it again")
        packed = self._source.find(self.main(name))[every]  # [..., N, B, 16]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [..., N, B, 32]
        values = torch.ldexp(CODES[codes.int()], exponents[..., None] - BIAS)  # exact, or subnormal
        return values.flatten(-2).transpose(-1, -2)

    def _blocks(self, name: str) -> list[int]:
        return find_part(self._source, self.main(name), ("U8",), (None, None, None, BLOCK // 2)).get_shape()
