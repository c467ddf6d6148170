"""Memory that is committed page by page: small pages, and giving back those that are not needed any more."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

_PR_SET_THP_DISABLE = 41


def commit_small_pages() -> None:
    """Keep the kernel from committing 2 MiB at the first touch: a short sequence would take its whole room."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a kernel without huge pages refuses, and needs none


def lazy_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of its own, committed as it is written and given back whole when the tensor goes.

    torch.empty may take a block that was freed before: its pages count as used whether they are written or not.
    """
    elements = math.prod(shape)
    memory = mmap.mmap(-1, max(1, elements * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=elements).view(shape)


def release_tails(rows: Tensor, start: int) -> None:
    """Give the whole pages of every row's elements from ``start`` on back to the system; what they held is lost.

    ``rows`` is contiguous, [rows, elements]. Where the system has no such call the pages stay until the tensor goes.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    row_bytes, page = rows.shape[1] * rows.itemsize, mmap.PAGESIZE
    for row in range(rows.shape[0]):
        end = rows.data_ptr() + (row + 1) * row_bytes
        first = -(-(end - row_bytes + start * rows.itemsize) // page) * page
        length = end // page * page - first
        if length > 0:  # a refusal costs memory and nothing else
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
