"""What an expert computes: down(SiLU(gate(x)) · up(x)), in int8 or in floating point.

Rows come sorted by expert, so that everything that is the same for all experts is done once for all rows.
Letters: P (token, expert) pairs, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from consilium import quantization
from consilium.checkpoint import ExpertTensors
from consilium.config import Quantization, RowDType
from consilium.content_hash import content_hash
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.quantization import Quantized
from consilium.silu import silu_and_multiply

# Raised whenever the arithmetic of a mode changes by a single bit.
ARITHMETIC_VERSION = "v1"
# Float products take other paths for few rows, so they always get this many: a row's bits then stay the same.
TILE = 32

DTYPES: dict[RowDType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as it is computed with: the gate's rows above the up projection's in one matrix."""

    gate_up: Tensor | Quantized  # [2F, D]
    down: Tensor | Quantized  # [D, F]

    def content_hash(self) -> bytes:
        """Equal for equal weights (consilium.content_hash)."""
        return content_hash((self.gate_up, self.down))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for matrix in (self.gate_up, self.down):
            yield from matrix if isinstance(matrix, Quantized) else (matrix,)


class Arithmetic(Protocol):
    """One way to compute experts. A row's result never depends on the other rows."""

    @property
    def row_dtype(self) -> torch.dtype:
        """Element type of the rows it computes from; int8 rows come with scales."""

    @property
    def reply_dtype(self) -> torch.dtype:
        """Element type of the rows it returns."""

    @property
    def numerics_class(self) -> str:
        """Equal for workers that return the same bits for the same rows."""

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        """The weights to compute with, in memory of their own."""

    def compute(
        self, experts: Sequence[ExpertWeights], offsets: Sequence[int], rows: Tensor, scales: Tensor | None
    ) -> Tensor:
        """Output rows [P, D], P > 0; expert i computes rows[offsets[i]:offsets[i + 1]] of rows [P, D]."""


def find_arithmetic(quantization: Quantization, dtype: RowDType, hidden_size: int, expert_size: int) -> Arithmetic:
    """The arithmetic for a deployment, its kernels proved on this CPU. Raises ConsiliumError when none is right."""
    if quantization == "none":
        return FloatArithmetic(DTYPES[dtype])
    if quantization == "int8-weight-only":
        from consilium.weight_only import WeightOnlyArithmetic  # which builds on this module

        return WeightOnlyArithmetic(DTYPES[dtype])
    product = find_integer_product([(2 * expert_size, hidden_size), (hidden_size, expert_size)])
    return Int8Arithmetic(DTYPES[dtype], product)


def compute_expert(
    arithmetic: Arithmetic, weights: ExpertWeights, rows: Tensor, scales: Tensor | None = None
) -> Tensor:
    """One expert alone: rows [P, D] -> [P, D]."""
    return arithmetic.compute([weights], [0, rows.shape[0]], rows, scales)


def prepare_int8(tensors: ExpertTensors) -> ExpertWeights:
    """An expert in int8, quantized here unless it is int8 already."""
    gate, up, down = (
        matrix if isinstance(matrix, Quantized) else quantization.quantize_weight(matrix) for matrix in tensors
    )
    gate_up = Quantized(torch.cat([gate.values, up.values]), torch.cat([gate.scales, up.scales]))  # [2F, D], [2F]
    return ExpertWeights(gate_up, down)


class Int8Arithmetic:
    """W8A8 as consilium.quantization defines it, with SiLU in float32 between the two products."""

    row_dtype = torch.int8

    def __init__(self, reply_dtype: torch.dtype, product: IntegerProduct) -> None:
        self.reply_dtype = reply_dtype
        # Exact integers and defined roundings: one class for every CPU and every kernel that passed the proof.
        self.numerics_class = f"int8/cpu/{ARITHMETIC_VERSION}"
        self._product = product

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        return prepare_int8(tensors)

    def compute(
        self, experts: Sequence[ExpertWeights], offsets: Sequence[int], rows: Tensor, scales: Tensor | None
    ) -> Tensor:
        if scales is None:
            raise TypeError("int8 rows come with scales")
        gate_up = self._multiply(Quantized(rows, scales), [expert.gate_up for expert in experts], offsets)  # [P, 2F]
        hidden = quantization.quantize_rows(silu_and_multiply(gate_up))  # [P, F]
        return self._multiply(hidden, [expert.down for expert in experts], offsets).to(self.reply_dtype)  # [P, D]

    def _multiply(self, x: Quantized, weights: Sequence[Tensor | Quantized], offsets: Sequence[int]) -> Tensor:
        """Every expert's rows of x [P, K] times that expert's weight [N, K]: float32 [P, N]."""
        parts = []
        for weight, (start, end) in zip(weights, pairwise(offsets), strict=True):
            if not isinstance(weight, Quantized):
                raise TypeError("these weights were not prepared for int8")
            if start < end:
                part = Quantized(x.values[start:end], x.scales[start:end])
                parts.append(quantization.multiply(part, weight, self._product))
        return _concatenate(parts)


class FloatArithmetic:
    """The checkpoint's weights in float32 or bfloat16, with SiLU in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.row_dtype = dtype
        self.reply_dtype = dtype
        self.numerics_class = float_class(str(dtype).removeprefix("torch."))

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        gate, up, down = tensors.floats()
        gate_up = torch.cat([gate, up]).to(self.row_dtype)  # [2F, D] copied by cat
        return ExpertWeights(gate_up, down.to(self.row_dtype, copy=True))

    def compute(
        self, experts: Sequence[ExpertWeights], offsets: Sequence[int], rows: Tensor, scales: Tensor | None
    ) -> Tensor:
        if scales is not None:
            raise TypeError("only int8 rows come with scales")
        gate_up = self._multiply(rows, [expert.gate_up for expert in experts], offsets)  # [P, 2F]
        hidden = silu_and_multiply(gate_up.float()).to(self.row_dtype)  # [P, F]
        return self._multiply(hidden, [expert.down for expert in experts], offsets)  # [P, D]

    def _multiply(self, x: Tensor, weights: Sequence[Tensor | Quantized], offsets: Sequence[int]) -> Tensor:
        """Every expert's rows of x [P, K] times that expert's weight [N, K]: [P, N]."""
        parts = []
        for weight, (start, end) in zip(weights, pairwise(offsets), strict=True):
            if isinstance(weight, Quantized):
                raise TypeError("these weights were prepared for int8")
            if start < end:
                parts.append(tiled_linear(x[start:end], weight))
        return _concatenate(parts)


def float_class(kind: str) -> str:
    """The numerics class of float products: the order of their sums is torch's own, by CPU and number of threads."""
    isa, threads = torch.backends.cpu.get_cpu_capability().replace(" ", "-").lower(), torch.get_num_threads()
    return f"{kind}/cpu/{isa}/torch-{torch.__version__}/threads-{threads}/{ARITHMETIC_VERSION}"


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K], M > 0, times the transpose of weight [N, K] in tiles of equal size, the last one padded with zeros."""
    count = x.shape[0]
    padded = functional.pad(x, (0, 0, 0, -count % TILE))
    tiles = padded.view(-1, TILE, x.shape[1]).unbind()
    return _concatenate([functional.linear(tile, weight) for tile in tiles])[:count]  # [M, N]


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
