"""Compiles kernels for a GPU that is not here: what launches them runs on CPU tensors, and nothing is executed.

The interpreter takes more than the compiler does, so that a kernel may be right in every test and still not compile.
Use it in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


class _AbsentDevice:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """While this is open launches compile for sm_90 and do nothing else; what was compiled is listed."""
    found: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        found.append(run(self, *args, warmup=True, **kwargs))
        return found[-1]

    triton.runtime.driver.set_active(_AbsentDevice())
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run
