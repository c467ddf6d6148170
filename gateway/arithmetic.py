"""What the engine computes with: floats of one dtype, or int8 for the dense layers, the experts' rows, or both.

Letters: T rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.config import Config, DenseQuantization, has_integer_rows
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.model_config import ModelConfig
from consilium.wire import ROW_DTYPES


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``dense`` and ``experts`` are the exact products of int8, None where floats are used."""

    dtype: torch.dtype  # of keys and values, and of whatever is not int8
    dense: IntegerProduct | None = None  # for the projections and the head
    experts: IntegerProduct | None = None  # quantizes the rows that experts get

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of what goes from layer to layer: int8 is quantized from float32."""
        return self.dtype if self.dense is None and self.experts is None else torch.float32

    def expert_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [T, D] as experts take it: int8 with scales [T], or floats."""
        return (x.to(self.dtype), None) if self.experts is None else self.experts.quantize(x.contiguous())


def find_arithmetic(config: Config, model: ModelConfig) -> Arithmetic:
    """The arithmetic of a deployment, its kernels proved on this CPU. Raises ConsiliumError when none is right."""
    dense = dense_quantization(config)
    product = None
    experts = has_integer_rows(config.quantization)
    if experts or dense == "int8":
        product = find_integer_product(dense_shapes(model))
    return Arithmetic(
        ROW_DTYPES[config.dtype],
        product if dense == "int8" else None,
        product if experts else None,
    )


def dense_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    """Of every matrix [N, K] that the gateway multiplies with."""
    hidden, of = model.hidden_size, model.latent
    shapes = [(hidden, model.heads_size), (model.vocab_size, hidden)]
    if of is None:
        shapes.append((model.heads_size + 2 * model.num_kv_heads * model.head_dim, hidden))
    else:
        queries, latent = model.num_heads * (of.plain_size + of.rotated_size), of.rank + of.rotated_size
        shapes.append(((of.query_rank or queries) + latent, hidden))
        shapes += [(queries, of.query_rank)] if of.query_rank else []
    for size in (model.dense_size, model.shared_size):
        shapes += [(size, hidden), (hidden, size)] if size else []
    return shapes


def dense_quantization(config: Config) -> DenseQuantization:
    """That of the projections and the head: as configured, else int8 where the experts get rows of int8."""
    return config.gateway.dense_quantization or ("int8" if has_integer_rows(config.quantization) else "none")
