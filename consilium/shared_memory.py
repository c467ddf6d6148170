"""Memory that two processes of one host share: a memfd without a name, gone with the last process that has it.

The gateway makes one for each worker and knows which bytes of it are in use; the worker only maps it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from consilium.errors import WireError

# Whoever maps a file that somebody else can shorten dies of SIGBUS when they do.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
LARGEST = 2**32  # bytes of address space that a peer can make us map
ALIGNMENT = 64
# NumPy knows no bfloat16.
_NUMPY_DTYPES = {torch.int8: np.int8, torch.bfloat16: np.int16, torch.float32: np.float32}


class SharedMemory:
    """A mapping [size] of bytes; pages are committed as they are written."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(descriptor, size)

    @classmethod
    def create(cls, size: int) -> tuple[SharedMemory, int]:
        """New memory, and the descriptor that another process maps it by; closing that is the caller's business."""
        descriptor = os.memfd_create("consilium", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        return cls(descriptor, size), descriptor

    @classmethod
    def attach(cls, descriptor: int) -> SharedMemory:
        """Map what a peer sent. Raises WireError for anything but a sealed memfd of a sensible size."""
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            raise WireError("the descriptor is no memfd") from None
        size = os.fstat(descriptor).st_size
        if seals & SEALS != SEALS or not 0 < size <= LARGEST:
            raise WireError(f"the memfd of {size} bytes must be sealed against shrinking, growing and other seals")
        try:
            return cls(descriptor, size)
        except OSError as error:  # for reading only, or there is no address space left
            raise WireError(f"the memfd of {size} bytes cannot be mapped: {error.strerror}") from None

    def check(self, begin: int, end: int) -> None:
        """Raises WireError when these bytes are not all inside, or do not begin where a call may."""
        if begin % ALIGNMENT or end > self.size:
            raise WireError(
                f"the call's {end - begin} bytes at {begin} do not lie in the shared memory of {self.size} bytes, "
                f"or do not begin at a multiple of {ALIGNMENT}"
            )

    def array(self, shape: tuple[int, ...], dtype: DTypeLike, offset: int) -> NDArray[Any]:
        """A view of what lies at ``offset``; the caller has made sure that it is inside."""
        return np.ndarray(shape, dtype, self._map, offset)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
        """The same for torch."""
        found = torch.from_numpy(self.array(shape, _NUMPY_DTYPES[dtype], offset))
        return found.view(torch.bfloat16) if dtype is torch.bfloat16 else found


class Regions:
    """Which bytes of a shared memory are in use: the first gap that is large enough is taken."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used: list[tuple[int, int]] = []  # begin and end, ascending

    def take(self, size: int) -> int | None:
        """Where ``size`` bytes are now ours; None when there is no gap for them."""
        begin, place = 0, 0
        for start, stop in self._used:
            if begin + size <= start:
                break
            begin, place = -(-stop // ALIGNMENT) * ALIGNMENT, place + 1
        if begin + size > self._size:
            return None
        self._used.insert(place, (begin, begin + size))
        return begin

    def free(self, begin: int) -> None:
        """Give back what ``take`` said begins there."""
        self._used = [each for each in self._used if each[0] != begin]
