"""Compiles the kernels of experts for an H100, which takes no GPU, by way of what launches them.

A program of its own (``python -m tests.gpu.compile_kernels``), for a process either interprets or compiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from consilium.gpu.experts import COLUMNS, ExpertForm, compute
from consilium.gpu.flags import meet, own_pairs
from consilium.gpu.jit import INTERPRETED
from consilium.gpu.quantize import quantize_rows
from consilium.gpu.sort import sort_pairs
from consilium.gpu.tally import Tally
from consilium.gpu.tiling import Blocks, Tiling
from consilium.model_config import ClampedSwiGLU
from tests.gpu.compile_only import compiling

TILINGS = (
    Tiling(16, Blocks(32, 64), Blocks(32, 64)),
    Tiling(64, Blocks(32, 64), Blocks(32, 64), quantize_first=True),
)
ODD = ClampedSwiGLU(1.702, 7.0)
FORMS = (
    ExpertForm(256, 128, torch.int8, torch.int8, torch.bfloat16),
    ExpertForm(72, 40, torch.int8, torch.int8, torch.float32, biased=True, activation=ODD),
    ExpertForm(256, 128, torch.bfloat16, torch.int8, torch.bfloat16),
    ExpertForm(256, 128, torch.float32, torch.float32, torch.float32),
)
LARGEST_SHARED = 227 * 2**10  # bytes a program may have


def launch(form: ExpertForm, tiling: Tiling) -> None:
    """As in a step of 6 tokens. (The table names no experts: nothing is executed.)"""
    table = torch.zeros(4, COLUMNS, dtype=torch.int64)
    groups = sort_pairs(torch.zeros(6, 2, dtype=torch.int32), table, tiling.block_m)
    x = torch.zeros(6, form.hidden_size, dtype=form.rows)
    scales = torch.zeros(6) if form.rows is torch.int8 else None
    compute(form, tiling, table, groups, x, scales, torch.zeros(12, form.hidden_size, dtype=form.replies))


def hand_over() -> None:
    """The flags of a step through an arena, and its count."""
    words, numbers = torch.zeros(64, dtype=torch.int32), torch.zeros(6, 2, dtype=torch.int32)
    meet(words, words, tell=words, tell_at=1, words=words, count=2, wait_at=16, blame=1, spins=100)
    own_pairs(numbers, words, torch.zeros(4, COLUMNS, dtype=torch.int64), numbers, words, worker=1, blame=2)
    Tally(2, 4, words.device).add(numbers.view(2, 3, 2), words[:1])


def check(kernels: Sequence[Any], exact: bool) -> None:
    """Raises ValueError where one fuses what the CPU does not, loses tiny numbers or order, or takes too much room."""
    for kernel in kernels:
        ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
        ordered = kernel.name != "_meet" or (".sys.release." in ptx and ".sys.acquire." in ptx)
        if (exact and "fma.rn.f32" in ptx) or ".ftz" in ptx or shared > LARGEST_SHARED or not ordered:
            raise ValueError(f"{kernel.name}, with {shared} bytes of shared memory:\n{ptx}")


def main() -> None:
    """Twice, as what Triton finds changed since the first launch is an error of the second one."""
    assert not INTERPRETED
    names = set[str]()
    for _ in range(2):
        for form in FORMS:
            integers = form.rows is torch.int8
            with compiling() as found:
                for tiling in TILINGS if integers else TILINGS[:1]:
                    launch(form, tiling)
                quantize_rows(torch.zeros(3, 5000))
                hand_over()
            check(found, exact=integers)
            names |= {kernel.name for kernel in found}
    print(*sorted(names))


if __name__ == "__main__":
    main()
