"""What the engine computes with: floats of one dtype, or int8 for the dense layers, the experts' rows, or both.

Letters: T rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.config import Config, DenseQuantization
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
    if "int8" in (dense, config.quantization):
        inner, hidden = model.num_heads * model.head_dim, model.hidden_size
        qkv = inner + 2 * model.num_kv_heads * model.head_dim
        shapes = [(qkv, hidden), (hidden, inner), (model.vocab_size, hidden)]
        if model.dense_size:
            shapes += [(model.dense_size, hidden), (hidden, model.dense_size)]
        product = find_integer_product(shapes)
    return Arithmetic(
        ROW_DTYPES[config.dtype],
        product if dense == "int8" else None,
        product if config.quantization == "int8" else None,
    )


def dense_quantization(config: Config) -> DenseQuantization:
    """That of the projections and the head: as configured, else int8 where the experts compute in int8."""
    return config.gateway.dense_quantization or ("int8" if config.quantization == "int8" else "none")
