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


def jit_whatever(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """As ``jit``; one kernel serves all values of these arguments, which change from call to call.

    Triton compiles others for 1 and for multiples of 16, at the first call that has one.
    """
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(names))
    return decorate


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
