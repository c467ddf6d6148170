"""A kernel's work on as many threads as torch was told to use (``torch.set_num_threads``).

Kernels release the interpreter lock, so a helper begins while this thread is in its own kernel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from consilium.kernels.sharing import board_bytes

logger = logging.getLogger(__name__)

# Below so many bytes of weights a thread, handing a part over costs more than it saves (about 50 µs).
WORTH = 2**19

Sharer = tuple[int, int, int]  # what a kernel is told of those who share its work: see consilium.kernels.sharing


def count_slices(weight_bytes: int) -> int:
    """How many threads are worth having for work that reads so many bytes of weights."""
    return max(1, min(torch.get_num_threads(), weight_bytes // WORTH))


def share(work: Callable[[Sharer], None], phases: int, parts: int) -> None:
    """Run ``work``, a kernel that shares its blocks out itself, here and on ``parts`` - 1 other threads.

    Returns when all blocks are computed. A thread that comes later finds none left, and touches nothing but the board
    and what ``work`` keeps alive.
    """
    board = np.zeros(board_bytes(phases, parts), np.uint8)
    for part in range(1, parts):
        _helpers(parts - 1).put(partial(_begin, work, board, part, parts))
    _begin(work, board, 0, parts)


def _begin(work: Callable[[Sharer], None], board: NDArray[np.uint8], part: int, parts: int) -> None:
    work((board.ctypes.data, part, parts))


def run(slices: list[Callable[[], None]]) -> None:
    """Run every slice, the last one on this thread; returns or raises only when none runs any more."""
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


@cache
def _helpers(count: int) -> SimpleQueue[Callable[[], None]]:
    """Where ``count`` threads wait for work. Handing it to an executor instead takes three times as long."""
    jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for number in range(count):
        threading.Thread(target=_help, args=(jobs,), name=f"kernel-{number}", daemon=True).start()
    return jobs


def _help(jobs: SimpleQueue[Callable[[], None]]) -> None:
    while True:
        job = jobs.get()
        try:
            job()
        except Exception:  # whoever shares the work computes what is left
            logger.exception("a kernel failed in a helper thread")
        del job  # with the memory that it keeps alive
