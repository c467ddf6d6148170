"""What training changed in the dense model, small enough to be kept in the package, and how it is put back exactly.

Every matrix gets W + Σ_j b_j · a_j · 2^e_j with int8 columns b_j and rows a_j: integers times powers of two, which
float64 holds without rounding in whatever order they are summed (``MOST_BITS``), then one rounding to float32. So every
machine makes the same bytes.
Letters: L layers, D hidden size, E experts, S neurons of an expert, r rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from consilium.default_model.gguf_file import Array
from consilium.errors import CheckpointError

FILE = Path(__file__).with_name("sparse.npz")
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# float64 has 53 bits; products of int8 need 14, the sum of 1024 of them 10 more.
MOST_BITS = 29


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one matrix [out, in] in every layer."""

    a: NDArray[np.int8]  # [L, r, in]
    b: NDArray[np.int8]  # [L, out, r]
    exponents: NDArray[np.int8]  # [L, r]

    def apply(self, layer: int, matrix: Array) -> Array:
        """``matrix`` of ``layer`` with its change, rounded once. Raises CheckpointError where the shapes do not fit."""
        a, b, exponents = self.a[layer], self.b[layer], self.exponents[layer].astype(np.int32)
        if matrix.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"the trained change is of a matrix of {b.shape[0]} × {a.shape[1]}, found {matrix.shape}; "
                "it belongs to another model"
            )
        changed: NDArray[np.float64] = np.ldexp(b.astype(np.float64), exponents) @ a.astype(np.float64)  # exact
        changed += matrix
        return changed.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Delta:
    """Everything that training adds to the dense model.

    The changes of gate, up [E·S, D] and down [D, E·S] are of the experts' neurons, one expert behind the other.
    """

    top_k: int
    neurons: NDArray[np.uint16]  # [L, E, S] the dense neurons of every expert; some are in two
    routers: Array  # [L, E, D]
    attention_norms: Array  # [L, D]
    ffn_norms: Array  # [L, D]
    final_norm: Array  # [D]
    changes: Mapping[str, LowRank]  # by the names of MATRICES

    @property
    def num_experts(self) -> int:
        return int(self.routers.shape[1])

    @property
    def expert_size(self) -> int:
        return int(self.neurons.shape[2])

    @classmethod
    def load(cls, file: Path) -> Delta:
        """What ``save`` wrote."""
        with np.load(file) as stored:
            changes = {
                name: LowRank(stored[f"{name}.a"], stored[f"{name}.b"], stored[f"{name}.exponents"])
                for name in MATRICES
            }
            norms = (stored["attention_norms"], stored["ffn_norms"], stored["final_norm"])
            return cls(int(stored["top_k"]), stored["neurons"], stored["routers"], *norms, changes)

    def save(self, file: Path) -> None:
        """Write all arrays, compressed."""
        arrays = {
            f"{name}.{part}": getattr(change, part)
            for name, change in self.changes.items()
            for part in ("a", "b", "exponents")
        }
        np.savez_compressed(
            file,
            top_k=np.int64(self.top_k),
            neurons=self.neurons,
            routers=self.routers,
            attention_norms=self.attention_norms,
            ffn_norms=self.ffn_norms,
            final_norm=self.final_norm,
            **arrays,
        )


def file_hash() -> str:
    """SHA-256 of the delta in the package, in hexadecimal."""
    return hashlib.sha256(FILE.read_bytes()).hexdigest()
