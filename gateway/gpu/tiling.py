"""How attention is cut up: into tiles of queries, tiles of keys, and chunks of positions.

Letters: T rows of the step, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gateway.gpu.heads import HeadShape

TILE = 4  # numbers that a tile has: its first row, how many rows, the first one's position, its row of the block table


@dataclass(frozen=True, slots=True)
class Tiling:
    """How attention is cut up. Results of different tilings differ by rounding."""

    rows: int = 64  # of queries and heads that one program takes: 64 and more are a warpgroup's product on Hopper
    keys: int = 64  # positions at a time
    chunk: int = 256  # positions
    warps: int = 4
    stages: int = 5  # where a page is comes before what it has: two tiles of keys and values are in flight

    def positions(self, shape: HeadShape) -> int:
        """Query positions of one tile."""
        return max(1, self.rows // shape.group)

    def chunks(self, positions: int) -> int:
        """Chunks of a sequence of so many positions."""
        return -(-positions // self.chunk)


# Of decoding steps, and of steps with prompts: the same for the same bits, else what suits each best.
INVARIANT = Tiling(), Tiling()
FAST = Tiling(rows=16, chunk=128), Tiling(rows=128, warps=8)
# For keys and values in float32, which comparisons with the CPU have: no matrix unit multiplies them exactly.
FLOAT32 = Tiling(rows=16, keys=16), Tiling(rows=16, keys=16)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a step, and where the sequences' pages are."""

    table: Tensor  # int32 [tiles, TILE]
    pages: Tensor  # int32 [S, blocks]
    positions: Tensor  # int32 [T]
    chunks: int  # of the longest sequence
    split: bool  # a program for every chunk
    tiling: Tiling

    @property
    def partials(self) -> int:
        """Partial results of each row and head."""
        return self.chunks if self.split else 1
