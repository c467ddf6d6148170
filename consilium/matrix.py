"""What a weight matrix may be, as a checkpoint holds it and as an expert is computed with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from consilium.int4 import Int4, Int4Rows
from consilium.quantization import Quantized

Stored = Tensor | Quantized | Int4Rows
Prepared = Tensor | Quantized | Int4


def tensors_of(matrix: Stored | Prepared) -> tuple[Tensor, ...]:
    """Every tensor of it; values come before scales."""
    return (matrix,) if isinstance(matrix, Tensor) else (matrix[0], matrix[1])


def map_tensors(matrix: Prepared, change: Callable[[Tensor], Tensor]) -> Prepared:
    """The same matrix of other tensors."""
    if isinstance(matrix, Tensor):
        return change(matrix)
    values = change(matrix.values)
    return matrix._replace(values=values, scales=change(matrix.scales))


def to_floats(matrix: Stored) -> Tensor:
    """What it stands for: float32 [N, K], or the tensor itself."""
    if isinstance(matrix, Quantized):
        return matrix.values.float() * matrix.scales[:, None]
    return matrix.floats() if isinstance(matrix, Int4Rows) else matrix
