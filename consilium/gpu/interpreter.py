"""Triton 3.6's interpreter mended, for tests: it fails beside numpy 2.4, and prepares more than it computes."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Once, before any kernel runs."""
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _numpy_dtype(interpreter._get_np_dtype)
    interpreter.InterpretedFunction.__call__ = _call


def _with_index(patch: Any) -> Any:
    """Loops over bounds that a kernel is given: numpy takes no array of one element for an integer any more."""

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_and_mend


def _numpy_dtype(find: Any) -> Any:
    """Triton's own builds its table anew for every operation."""
    by_name = cache(lambda name: find(getattr(tl, name)))
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}

    def find_or_recall(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type) or scalar.name.startswith("fp8"):
            return find(dtype)
        return by_name(names.get(scalar.name, scalar.name))

    return find_or_recall


@cache
def _builtins(package: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Triton's own looks through all names of the language at every launch."""
    for name in _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # else it is patched already
            interpreter._patch_attr(package, name, member, builder, scope)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls: what Triton's own patches is patched already, but for what its library sees."""
    if self.fn.__module__.startswith("triton."):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
