"""A kernel's work in slices, on as many threads as torch was told to use (``torch.set_num_threads``)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import torch

# Below so many bytes of weights a thread, handing the slice over costs more than it saves (about 50 µs).
WORTH = 2**19


def count_slices(weight_bytes: int) -> int:
    """How many slices are worth making of work that reads so many bytes of weights."""
    return max(1, min(torch.get_num_threads(), weight_bytes // WORTH))


def run(slices: list[Callable[[], None]]) -> None:
    """Run every slice, the last one on this thread; returns or raises only when none runs any more.

    Kernels release the interpreter lock.
    """
    if len(slices) == 1:  # nothing to wait for, which would take a while
        slices[0]()
        return
    futures: list[Future[None]] = []
    try:
        futures.extend(_pool().submit(each) for each in slices[:-1])
        slices[-1]()
    finally:
        wait(futures)
    for future in futures:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="kernel")
