"""How fast this worker computes, for a router that shares work out among unequal ones."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from consilium.experts import Arithmetic, ExpertWeights
from consilium.quantization import quantize_rows

ROWS, REPEATS = 33, 5
UNIT_ROW_NS, UNIT_READ_NS = 10_000, 80_000  # of a worker of speed 1; only their ratio means anything


def measure(
    arithmetic: Arithmetic, experts: Sequence[ExpertWeights], hidden_size: int, speed: float | None = None
) -> tuple[int, int]:
    """Nanoseconds for one more row of an expert, and for reading its weights; from ``speed`` where it is stated.

    Several ``experts`` are asked at once, as a device needs it. Rounded to powers of the square root of two: machines
    that are alike shall look alike.
    """
    if speed is not None:
        return max(1, round(UNIT_ROW_NS / speed)), max(1, round(UNIT_READ_NS / speed))
    one, many = (_seconds(arithmetic, experts, hidden_size, rows) for rows in (1, ROWS))
    row = max((many - one) / (ROWS - 1), one / 100)
    return _rounded(row), _rounded(max(one - row, one / 10))


def _seconds(arithmetic: Arithmetic, experts: Sequence[ExpertWeights], hidden_size: int, rows: int) -> float:
    """For each expert, in the shortest of a few runs: what else the machine does only makes them longer."""
    x = torch.ones(rows * len(experts), hidden_size)
    offsets = [rows * each for each in range(len(experts) + 1)]
    inputs = quantize_rows(x) if arithmetic.row_dtype == torch.int8 else (x.to(arithmetic.row_dtype), None)
    found = math.inf
    for _ in range(REPEATS):
        started = time.perf_counter()
        arithmetic.compute(experts, offsets, *inputs)
        found = min(found, time.perf_counter() - started)
    return found / len(experts)


def _rounded(seconds: float) -> int:
    return max(1, round(2 ** (round(2 * math.log2(seconds * 1e9)) / 2)))
