"""What an expert computes: down(SiLU(gate(x)) · up(x)), in int8, in int4 or in floating point.

Rows come sorted by expert, so that everything that is the same for all experts is done once for all rows.
Letters: P (token, expert) pairs, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.activation import activate
from consilium.checkpoint import ExpertTensors
from consilium.content_hash import content_hash
from consilium.matrix import Prepared, Stored, map_tensors, tensors_of
from consilium.model_config import ClampedSwiGLU

# Raised whenever the arithmetic of a mode changes by a single bit.
ARITHMETIC_VERSION = "v1"


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as it is computed with."""

    gate: Prepared  # [F, D]
    up: Prepared  # [F, D]
    down: Prepared  # [D, F]
    biases: tuple[Tensor, Tensor, Tensor] | None = None  # of gate, up [F] and down [D], float32
    activation: ClampedSwiGLU | None = None  # None is SiLU
    # Of every tensor in the order of content_hash, as kernels read it: where that table lies, and what keeps it there.
    table: int = field(init=False, compare=False)
    addresses: NDArray[np.int64] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        addresses = np.array([tensor.data_ptr() for tensor in self.tensors()], np.int64)
        object.__setattr__(self, "addresses", addresses)
        object.__setattr__(self, "table", addresses.ctypes.data)

    def content_hash(self) -> bytes:
        """Equal for equal weights (consilium.content_hash)."""
        return content_hash((self.gate, self.up, self.down, *(self.biases or ())))

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The same expert of other tensors; ``change`` is given each in the order of :meth:`tensors`."""
        gate, up, down = (map_tensors(matrix, change) for matrix in (self.gate, self.up, self.down))
        biases = None
        if self.biases is not None:
            first, second, third = map(change, self.biases)
            biases = first, second, third
        return ExpertWeights(gate, up, down, biases, self.activation)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def plain(self) -> bool:
        """Whether it is nothing but SiLU between three products."""
        return self.biases is None and self.activation is None

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down projection gets, [P, F] float32, from the products with gate and up."""
        if self.biases is not None:
            gate, up = gate + self.biases[0], up + self.biases[1]
        return activate(gate, up, self.activation)

    def finish(self, out: Tensor) -> Tensor:
        """The output rows [P, D] from the product with down."""
        return out if self.biases is None else out + self.biases[2]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the content hash."""
        for matrix in (self.gate, self.up, self.down):
            yield from tensors_of(matrix)
        yield from self.biases or ()


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
        """The weights to compute with; those that are int8 on disk stay where they are mapped in int8."""

    def compute(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Output rows [P, D], P > 0; expert i computes rows[offsets[i]:offsets[i + 1]] of rows [P, D].

        With ``indices`` int32 [P] rows are [U, D], and expert i computes those at indices[offsets[i]:offsets[i + 1]].
        Outputs are written into ``out`` [P, D] of the reply's dtype where it is given.
        """


def prepare_weights(tensors: ExpertTensors, prepare: Callable[[Stored], Prepared]) -> ExpertWeights:
    """An expert whose matrices are ``prepare``d."""
    biases = None
    if tensors.biases is not None:
        gate, up, down = (bias.to(torch.float32, copy=True) for bias in tensors.biases)
        biases = gate, up, down
    gate_up_down = prepare(tensors.gate), prepare(tensors.up), prepare(tensors.down)
    return ExpertWeights(*gate_up_down, biases=biases, activation=tensors.activation)


def compute_expert(
    arithmetic: Arithmetic, weights: ExpertWeights, rows: Tensor, scales: Tensor | None = None
) -> Tensor:
    """One expert alone: rows [P, D] -> [P, D]."""
    return arithmetic.compute([weights], [0, rows.shape[0]], rows, scales)
