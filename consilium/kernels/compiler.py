"""How kernels are compiled: by numba, at the first call, and kept in the user's cache folder for the next process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from consilium.models import cache_folder

# Where an image keeps kernels that were compiled as it was built (`python -m consilium.kernels`).
SHIPPED = Path(sys.prefix) / "share" / "consilium-kernels"


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written. A new folder begins with what is shipped.

    numba notices only a change of the file that holds a kernel, not of what it calls: the name has a hash of all.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    name = digest.hexdigest()[:16]
    chosen = os.environ.get("CONSILIUM_KERNELS")
    for parent in [Path(chosen)] if chosen else [cache_folder() / "kernels", _temporary_folder()]:
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _ours(parent):
                _begin(parent / name)
                return parent / name
        except OSError:
            continue
    return None


def _ours(folder: Path) -> bool:
    """Whether only we can write there: numba's index can run code when it is read."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _begin(folder: Path) -> None:
    """Make ``folder`` with what is shipped in it, all at once: several processes may start together. Raises OSError."""
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            begun = Path(unfinished) / "kernels"
            if (SHIPPED / folder.name).is_dir():
                shutil.copytree(SHIPPED / folder.name, begun)
            begun.mkdir(exist_ok=True)
            begun.chmod(0o700)
            with contextlib.suppress(OSError):  # another process was first
                begun.rename(folder)
    if not os.access(folder, os.W_OK):
        raise PermissionError(folder)


def _temporary_folder() -> Path:
    """For containers, whose root and volumes are read-only."""
    return Path(tempfile.gettempdir()) / f"consilium-kernels-{os.getuid()}"


_FOLDER = _cache_folder()
if _FOLDER is not None:
    numba.config.CACHE_DIR = str(_FOLDER)  # type: ignore[attr-defined]

# Without fastmath LLVM neither reorders nor fuses float operations; "numpy" divides by zero as IEEE 754 has it.
kernel: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.njit(
    nogil=True, error_model="numpy", boundscheck=False, cache=_FOLDER is not None
)


def _define_pointer(dtype: Any) -> Any:
    """A function that numba can call: an address becomes a pointer to ``dtype``."""

    def pointer(context: Any, address: Any) -> Any:  # noqa: ARG001 (numba gives both)
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return intrinsic(pointer)


_float32_pointer, _int8_pointer = _define_pointer(types.float32), _define_pointer(types.int8)
_int32_pointer, _int64_pointer = _define_pointer(types.int32), _define_pointer(types.int64)
_uint16_pointer = _define_pointer(types.uint16)


@kernel
def floats(address: int, size: int) -> Any:
    """The float32 array [size] at ``address``."""
    return carray(_float32_pointer(address), size)


@kernel
def bytes_(address: int, size: int) -> Any:
    """The int8 array [size] at ``address``."""
    return carray(_int8_pointer(address), size)


@kernel
def halves(address: int, size: int) -> Any:
    """The uint16 array [size] at ``address``: bfloat16 bit by bit, which numba does not know."""
    return carray(_uint16_pointer(address), size)


@kernel
def ints(address: int, size: int) -> Any:
    """The int32 array [size] at ``address``."""
    return carray(_int32_pointer(address), size)


@kernel
def longs(address: int, size: int) -> Any:
    """The int64 array [size] at ``address``."""
    return carray(_int64_pointer(address), size)
