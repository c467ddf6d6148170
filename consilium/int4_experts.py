"""Experts in W4A8 as consilium.int4 defines it: int8's kernels and activations, with weights of half the size.

Letters: M rows, N output channels, K inputs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import ExpertTensors
from consilium.experts import ARITHMETIC_VERSION, ExpertWeights, prepare_weights
from consilium.int4 import Int4, Int4Rows, interleave, round_int4
from consilium.int8_experts import Int8Arithmetic
from consilium.integer_product import IntegerProduct
from consilium.kernels import grouped
from consilium.kernels.int8_tile import Kind
from consilium.matrix import Stored, to_floats
from consilium.quantization import Quantized

logger = logging.getLogger(__name__)

MANY_ROWS = 64  # from so many on threads share one expert's products, else the experts


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """The product with int4 weights, by a kind of kernel that was proved here (consilium.grouped_proof)."""

    kind: Kind

    def takes_many(self, rows: int) -> bool:
        return rows >= MANY_ROWS

    def multiply(self, x: Quantized, w: Int4) -> Tensor:
        """x [M, K] times the transpose of w [N, K]: float32 [M, N]."""
        rows, size = x.values.shape
        out = torch.empty(rows, w.rows)
        left = x.values.data_ptr(), x.scales.data_ptr(), rows
        right = w.values.data_ptr(), w.scales.data_ptr(), w.rows, size, w.group

        def work(sharer: parallel.Sharer) -> None:
            grouped.multiply_shared(self.kind, *left, *right, out.data_ptr(), sharer)

        parallel.share(work, 1, parallel.count_slices(w.values.nbytes))
        return out

    def quantize(self, x: Tensor) -> Quantized:
        return IntegerProduct(self.kind, None).quantize(x)


class Int4Arithmetic(Int8Arithmetic):
    """Experts whose weights are taken as they are where they are symmetric int4 on disk, and rounded here elsewhere."""

    def __init__(self, reply_dtype: torch.dtype, product: GroupedProduct) -> None:
        super().__init__(reply_dtype, product)
        self.numerics_class = f"int4/{ARITHMETIC_VERSION}"

        self._said = False

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        if not self._said:
            self._said = True
            logger.info("experts in int4: %s", "as they are" if is_int4(tensors) else "rounded from other numbers")
        return prepare_weights(tensors, prepare_int4)

    def round(self, tensors: ExpertTensors, group: int) -> ExpertWeights:
        """As ``prepare``, in groups of so many inputs."""
        return prepare_weights(tensors, lambda matrix: interleave(round_int4(to_floats(matrix), group)))


def is_int4(tensors: ExpertTensors) -> bool:
    """Whether they are taken as they are."""
    return all(isinstance(matrix, Int4Rows) for matrix in tensors.matrices)


def prepare_int4(matrix: Stored) -> Int4:
    """A matrix in int4. Raises CheckpointError where its rows are no multiple of 8."""
    return interleave(matrix if isinstance(matrix, Int4Rows) else round_int4(to_floats(matrix)))
