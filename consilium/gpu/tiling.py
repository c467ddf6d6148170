"""How large the tiles of the grouped products are. No bit of integers depends on it, only the time."""

from __future__ import annotations

from dataclasses import dataclass


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
