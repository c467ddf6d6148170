"""Experts in W8A8 as consilium.quantization defines it, with SiLU in float32 between the products.

Int4Arithmetic (consilium.int4_experts) computes the same way with other weights.

Letters: P (token, expert) pairs, M experts, D hidden size, F expert FFN size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium import parallel
from consilium.checkpoint import ExpertTensors
from consilium.experts import ARITHMETIC_VERSION, ExpertWeights, prepare_weights
from consilium.int4 import Int4
from consilium.kernels import experts as kernel
from consilium.kernels.float_tile import BFLOAT16, FLOAT32
from consilium.kernels.int8_tile import Kind
from consilium.matrix import Stored, to_floats
from consilium.quantization import Quantized, quantize_weight


def prepare_int8(tensors: ExpertTensors) -> ExpertWeights:
    """An expert in int8: quantized here, unless it is int8 on disk, where its bytes stay mapped."""
    return prepare_weights(tensors, _quantized)


class Product(Protocol):
    """The product of quantized rows with an expert's matrices; IntegerProduct is that of int8."""

    @property
    def kind(self) -> Kind: ...

    def takes_many(self, rows: int) -> bool:
        """Whether so many rows are better off product by product."""
        ...

    def multiply(self, x: Quantized, w: Any) -> Tensor:
        """x [M, K] times the transpose of w [N, K]: float32 [M, N]."""
        ...

    def quantize(self, x: Tensor) -> Quantized:
        """Rows x [M, K] float32."""
        ...


class Int8Arithmetic:
    """One kernel call for all experts with few rows; for many rows, biases or other activations, product by product."""

    row_dtype = torch.int8

    def __init__(self, reply_dtype: torch.dtype, product: Product) -> None:
        self.reply_dtype = reply_dtype
        # Exact integers and defined roundings: one class for every CPU and GPU, and every kernel that passed the proof.
        self.numerics_class = f"int8/{ARITHMETIC_VERSION}"
        self._product = product

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        return prepare_int8(tensors)

    def compute(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        if scales is None:
            raise TypeError("int8 rows come with scales")
        x = Quantized(rows.contiguous(), scales.contiguous())
        found = out if out is not None else torch.empty(offsets[-1], rows.shape[1], dtype=self.reply_dtype)  # [P, D]
        few: list[tuple[ExpertWeights, int, int]] = []
        for weights, (start, end) in zip(experts, pairwise(offsets), strict=True):
            if start < end and (self._product.takes_many(end - start) or not weights.plain):
                found[start:end] = self._compute_one(weights, _chosen(x, indices, start, end))
            elif start < end:
                few.append((weights, start, end))
        if few:
            self._compute_few(few, x, indices, found)
        return found

    def _compute_one(self, weights: ExpertWeights, x: Quantized) -> Tensor:
        """Output rows [P, D] of one expert."""
        gate, up, down = _matrices(weights)
        multiply = self._product.multiply
        hidden = weights.between(multiply(x, gate), multiply(x, up))  # [P, F] float32
        return weights.finish(multiply(self._product.quantize(hidden), down))

    def _compute_few(
        self, parts: list[tuple[ExpertWeights, int, int]], x: Quantized, indices: Tensor | None, out: Tensor
    ) -> None:
        """The output rows ``start`` to ``end`` of each part, written into ``out`` [P, D]."""
        gate, hidden_size = _matrices(parts[0][0])[0], out.shape[1]
        expert_size = gate.rows if isinstance(gate, Int4) else len(gate.values)
        how = self._product.kind, (gate.group,) if isinstance(gate, Int4) else kernel.INT8
        tables = np.array([weights.table for weights, _, _ in parts], np.int64)  # [M]
        ranges = np.array([part[1:] for part in parts], np.int64)  # [M, 2]
        count = min(len(parts), parallel.count_slices(3 * expert_size * hidden_size * len(parts)))
        bounds = [len(parts) * part // count for part in range(count + 1)]
        chosen = 0 if indices is None else indices.data_ptr()
        rows = x.values.data_ptr(), x.scales.data_ptr(), chosen
        parallel.run(
            [
                partial(_run, how, (tables, ranges), (first, last), rows, (hidden_size, expert_size), out)
                for first, last in pairwise(bounds)
            ]
        )


class _Scratch(threading.local):
    """Memory of each thread for what is between the products: the system would commit its pages anew at every call."""

    memory = torch.empty(0, dtype=torch.int8)


_scratch = _Scratch()


def _run(
    how: tuple[Kind, kernel.Grouping],
    of_experts: tuple[NDArray[np.int64], NDArray[np.int64]],
    span: tuple[int, int],
    rows: tuple[int, int, int],
    sizes: tuple[int, int],
    out: Tensor,
) -> None:
    needed = kernel.scratch_bytes(*sizes)
    if len(_scratch.memory) < needed:
        _scratch.memory = torch.empty(needed, dtype=torch.int8)
    tables, ranges = (each.ctypes.data for each in of_experts)
    form = FLOAT32 if out.dtype is torch.float32 else BFLOAT16
    kernel.compute(*how, form, tables, ranges, *span, *rows, *sizes, _scratch.memory.data_ptr(), out.data_ptr())


def _chosen(x: Quantized, indices: Tensor | None, start: int, end: int) -> Quantized:
    if indices is None:
        return Quantized(x.values[start:end], x.scales[start:end])
    return Quantized(x.values[indices[start:end]], x.scales[indices[start:end]])


def _quantized(matrix: Stored) -> Quantized:
    if isinstance(matrix, Quantized):
        return Quantized(matrix.values.contiguous(), matrix.scales.contiguous())
    return quantize_weight(to_floats(matrix))


def _matrices(weights: ExpertWeights) -> list[Quantized | Int4]:
    found = [matrix for matrix in (weights.gate, weights.up, weights.down) if not isinstance(matrix, Tensor)]
    if len(found) < 3:
        raise TypeError("these weights were not prepared for integers")
    return found
