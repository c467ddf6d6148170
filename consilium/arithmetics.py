"""Which arithmetic a deployment computes its experts with."""

from __future__ import annotations

from functools import cache

import torch

from consilium.config import Quantization, RowDType
from consilium.experts import Arithmetic
from consilium.float_experts import FloatArithmetic
from consilium.int4_experts import GroupedProduct, Int4Arithmetic
from consilium.int4_proof import find_grouped_product
from consilium.int8_experts import Int8Arithmetic
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.weight_only import WeightOnlyArithmetic

DTYPES: dict[RowDType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_arithmetic(quantization: Quantization, dtype: RowDType, hidden_size: int, expert_size: int) -> Arithmetic:
    """The arithmetic for a deployment, its kernels proved on this CPU. Raises ConsiliumError when none is right."""
    if quantization == "none":
        return FloatArithmetic(DTYPES[dtype])
    if quantization == "int8-weight-only":
        return WeightOnlyArithmetic(DTYPES[dtype])
    if quantization == "int4":
        return Int4Arithmetic(DTYPES[dtype], _proved_int4((expert_size, hidden_size), (hidden_size, expert_size)))
    return Int8Arithmetic(DTYPES[dtype], _proved((expert_size, hidden_size), (hidden_size, expert_size)))


@cache
def _proved(*weight_shapes: tuple[int, int]) -> IntegerProduct:
    """The proof takes most of a second: once for each model in a process."""
    return find_integer_product(weight_shapes)


@cache
def _proved_int4(*weight_shapes: tuple[int, int]) -> GroupedProduct:
    """Likewise."""
    return find_grouped_product(weight_shapes)
