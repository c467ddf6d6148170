"""Reading a projection's matrix [N, K] and bias [N] with its rows in another order, or scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.model_config import ModelConfig
from consilium.quantization import Quantized


def halves_first(config: ModelConfig, heads: int) -> Tensor | None:
    """The order [heads * d] of rows in which a head's rotated pairs are (i, i + r/2); None where they are so already.

    A query's product with a key is the same in any order that both have.
    """
    if not config.rope.interleaved:
        return None
    return order_of(config.rotated_size, config.head_dim, heads)


def order_of(rotated: int, size: int, heads: int) -> Tensor:
    """In each head of ``size`` rows the even ones of the first ``rotated``, the odd ones, then the rest."""
    first = torch.arange(rotated)
    head = torch.cat((first[::2], first[1::2], torch.arange(rotated, size)))
    return (torch.arange(heads)[:, None] * size + head).reshape(-1)


def read_matrix(
    checkpoint: Checkpoint, name: str, shape: tuple[int, int], order: Tensor | None = None, scale: float = 1.0
) -> Tensor | Quantized:
    """The matrix ``name``.weight; untouched, it stays a view of its file. Raises CheckpointError."""
    matrix = checkpoint.matrix(f"{name}.weight", shape)
    if isinstance(matrix, Quantized):
        values, scales = matrix if order is None else (matrix.values[order], matrix.scales[order])
        return Quantized(values, scales if scale == 1 else scales * scale)
    matrix = matrix if order is None else matrix[order]
    return matrix if scale == 1 else matrix.float() * scale


def read_bias(checkpoint: Checkpoint, name: str, size: int, order: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The bias ``name``.bias, as ``read_matrix`` reads its matrix."""
    bias = checkpoint.tensor(f"{name}.bias", (size,))
    bias = bias if order is None else bias[order]
    return bias if scale == 1 else bias.float() * scale
