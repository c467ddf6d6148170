"""How kernels become code: compiled for the GPU by Triton, or run step by step by its interpreter.

The interpreter is for tests: it runs kernels on CPU tensors, slowly, where TRITON_INTERPRET=1 was set before this
module was imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from consilium.gpu import interpreter

jit: Callable[[Callable[..., Any]], Any] = triton.jit


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """As ``jit``, but one kernel does for all numbers ``names``, not one more for 1 and for multiples of 16."""
    made: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(names))
    return made


# Whether kernels are interpreted: then they take tensors of the CPU, and no others.
INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    interpreter.mend()

# Given at the launch of every kernel whose bits matter: multiplies and adds stay apart.
EXACT = {"enable_fp_fusion": False}


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``: what a block's sizes must be."""
    return 1 << max(0, number - 1).bit_length()


def tiles_of(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
