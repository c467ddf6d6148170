"""Linear layers whose rows do not depend on each other: int8 by exact sums, floats in tiles of one size.

Letters: T rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from consilium.float_experts import tiled_linear
from consilium.integer_product import IntegerProduct
from consilium.matrix import Stored, to_floats
from consilium.quantization import Quantized, quantize_weight


class Linear(Protocol):
    """x [T, K] -> [T, N], in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor: ...


class Int8Linear:
    """W8A8 as consilium.quantization defines it; x is float32."""

    def __init__(self, weight: Quantized, bias: Tensor | None, product: IntegerProduct) -> None:
        self._weight, self._bias, self._product = weight, bias, product

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the weight, its scales and its bias, 0 where there is none."""
        bias = 0 if self._bias is None else self._bias.data_ptr()
        return self._weight.values.data_ptr(), self._weight.scales.data_ptr(), bias

    @property
    def weight_bytes(self) -> int:
        return self._weight.values.nbytes

    def forward(self, x: Tensor) -> Tensor:
        y = self._product.multiply(self._product.quantize(x.contiguous()), self._weight)
        return y if self._bias is None else y + self._bias


class FloatLinear:
    """The weight in x's own dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = tiled_linear(x, self._weight)
        return y if self._bias is None else y + self._bias


class LinearMaker:
    """Makes every linear layer of a model: int8 where ``product`` is given, else floats of ``dtype``."""

    def __init__(self, dtype: torch.dtype, product: IntegerProduct | None) -> None:
        self._dtype, self._product = dtype, product

    def make(self, matrices: Sequence[Stored], biases: Sequence[Tensor] = ()) -> Linear:
        """One layer for the outputs of several matrices [N, K], one after the other."""
        bias = torch.cat([each.to(self._dtype) for each in biases]) if biases else None
        if self._product is None:
            floats = [to_floats(each).to(self._dtype) for each in matrices]
            return FloatLinear(floats[0] if len(floats) == 1 else torch.cat(floats), bias)
        return Int8Linear(quantize_matrices(matrices), bias, self._product)


def quantize_matrices(matrices: Sequence[Stored]) -> Quantized:
    """The outputs of several matrices [N, K] in int8, one after the other."""
    quantized = [each if isinstance(each, Quantized) else quantize_weight(to_floats(each)) for each in matrices]
    values, scales = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*quantized, strict=True))
    return Quantized(values.contiguous(), scales.contiguous())
