"""How large the tiles of the grouped products are. No bit of integers depends on it, only the time.

Sums of floats do depend on it, and a row's bits must not depend on its batch: for floats one tiling serves all batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Blocks:
    """One product: columns of a tile, what is summed over at a time, warps of a program, loads in flight."""

    n: int
    k: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Tiling:
    """Both products of a layer's experts, for one size of batch."""

    block_m: int  # rows of a tile
    gate_up: Blocks
    down: Blocks
    quantize_first: bool = False  # hidden rows by a kernel of their own, rather than again for each column tile


@dataclass(frozen=True, slots=True)
class Batch:
    """What a tiling is for: experts with any rows, and how many each of them has on average."""

    experts: float
    rows: float

    def distance(self, other: Batch) -> float:
        """0 for equal ones; one for each doubling."""
        return abs(math.log2(self.experts / other.experts)) + abs(math.log2(self.rows / other.rows))


Tilings = Sequence[tuple[Batch, Tiling]]

_FEW = Blocks(32, 256, 4, 4)  # narrow tiles: few experts must keep all multiprocessors busy
_SOME = Blocks(64, 128, 4, 4)
INTEGER_TILINGS: Tilings = (  # before anything was measured
    (Batch(8, 1), Tiling(16, _FEW, Blocks(64, 256, 4, 4))),
    (Batch(128, 4), Tiling(16, _SOME, _SOME)),
    (Batch(128, 32), Tiling(32, Blocks(64, 128, 4, 3), Blocks(128, 128, 4, 3), quantize_first=True)),
    (Batch(128, 64), Tiling(64, Blocks(64, 128, 4, 3), Blocks(128, 128, 4, 3), quantize_first=True)),
    (Batch(128, 256), Tiling(128, Blocks(64, 128, 4, 3), Blocks(128, 128, 8, 3), quantize_first=True)),
)
HALF_TILINGS: Tilings = ((Batch(128, 8), Tiling(32, Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3))),)
# No matrix unit has float32: wider tiles have no registers.
FLOAT_TILINGS: Tilings = ((Batch(128, 8), Tiling(16, Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2))),)
USUAL = {torch.int8: INTEGER_TILINGS, torch.bfloat16: HALF_TILINGS, torch.float32: FLOAT_TILINGS}  # by dtype of rows


def batch_of(pairs: int, experts: int) -> Batch:
    """What ``pairs`` that choose among ``experts`` at random come to."""
    active = experts * -math.expm1(pairs * math.log1p(-1 / experts)) if experts > 1 else 1.0
    return Batch(active, pairs / active)


def nearest(tilings: Tilings, batch: Batch) -> Tiling:
    """The tiling that was made for a batch most like this one."""
    return min(tilings, key=lambda each: each[0].distance(batch))[1]
