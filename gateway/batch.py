"""The rows of one step, and whose they are.

Letters: T rows of the step, r elements of a head that are rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.kernels.float_tile import BFLOAT16, FLOAT32, Form
from gateway.kv_cache import BLOCK, Cache, KVCache, blocks_for


@dataclass(slots=True)
class Segment:
    """Consecutive rows of one step that belong to one sequence."""

    cache: Cache
    row: int  # first row in the step
    length: int
    position: int  # of the first row in its sequence

    @property
    def rows(self) -> range:
        """Its rows in the step."""
        return range(self.row, self.row + self.length)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a contiguous cache."""
        if not isinstance(self.cache, KVCache):
            raise TypeError("kernels of the CPU read contiguous caches")
        return self.cache.keys, self.cache.values

    def numbers(self) -> list[int]:
        """What the kernel is told of it: see consilium.kernels.attention.attend."""
        keys, values = self.tensors
        strides = [tensor.stride(axis) * tensor.itemsize for axis in (0, 1) for tensor in (keys, values)]
        return [keys.data_ptr(), values.data_ptr(), *strides, self.row, self.length, self.position]


@dataclass(slots=True)
class StepRows:
    """The rows of one step: T token ids, whose they are, and what became of them."""

    tokens: Tensor  # [T]
    segments: list[Segment]
    failures: dict[int, Exception] = field(default_factory=dict, kw_only=True)  # row to why it has no valid result
    # Row to layers in which nobody held one of its experts.
    stood_in: dict[int, int] = field(default_factory=dict, kw_only=True)

    @property
    def prefill(self) -> bool:
        """Whether some of the rows are of prompts."""
        return len(self.tokens) > len(self.segments)

    def live_rows(self) -> Sequence[int]:
        """The rows that somebody still waits for: of sequences without a failed row."""
        if not self.failures:
            return range(len(self.tokens))
        spans = [each.rows for each in self.segments]
        return [row for span in spans if self.failures.keys().isdisjoint(span) for row in span]


@dataclass(slots=True)
class Batch(StepRows):
    """The rows of one step, as kernels of the CPU are told of them."""

    cos: Tensor  # [T, r/2] float32
    sin: Tensor  # [T, r/2] float32
    table: NDArray[np.int64] = field(init=False)  # the segments' numbers
    positions: int = field(init=False)  # of the longest sequence, in whole blocks
    _workspace: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.table = np.array([segment.numbers() for segment in self.segments], np.int64)
        self.positions = BLOCK * max((blocks_for(each.position + each.length) for each in self.segments), default=0)

    @property
    def form(self) -> Form:
        """What the caches are made of, for kernels."""
        return BFLOAT16 if self.segments[0].tensors[0].dtype is torch.bfloat16 else FLOAT32

    def workspace(self, size: int) -> Tensor:
        """At least ``size`` bytes that a layer may use until it ends: the same for all layers, so still in a cache."""
        if self._workspace is None or self._workspace.nbytes < size:
            self._workspace = torch.empty(size, dtype=torch.int8)
        return self._workspace
