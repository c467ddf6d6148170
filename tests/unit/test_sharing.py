"""Kernels whose threads share their work: every block once, whoever comes, and nobody goes before all is done."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from consilium import parallel
from consilium.kernels.compiler import kernel, longs
from consilium.kernels.sharing import board_bytes, done, meet, take

PHASES, BLOCKS = 3, 1000


@kernel
def count(counts: int, blocks: int, sharer: Any) -> bool:
    """Counts in each phase how often every block was taken; False when others were not done with the phase before."""
    found, whole = longs(counts, PHASES * blocks), True
    for phase in range(PHASES):
        block = take(sharer, blocks)
        while block >= 0:
            found[phase * blocks + block] += 1
            done(sharer)
            block = take(sharer, blocks)
        sharer = meet(sharer, blocks)
        for each in range(blocks):
            whole &= found[phase * blocks + each] == 1
    return whole


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, BLOCKS])
def test_every_block_is_computed_once_before_the_next_phase(parts: int, blocks: int) -> None:
    for _ in range(20):
        counts, whole = np.zeros(PHASES * blocks, np.int64), list[bool]()

        def work(sharer: parallel.Sharer, counts: Any = counts, whole: list[bool] = whole) -> None:
            whole.append(count(counts.ctypes.data, blocks, sharer))

        parallel.share(work, PHASES, parts)
        assert counts.tolist() == [1] * len(counts)
        assert all(whole)


def test_nobody_waits_for_a_thread_that_does_not_come() -> None:
    counts, board = np.zeros(PHASES * BLOCKS, np.int64), np.zeros(board_bytes(PHASES, 4), np.uint8)
    assert count(counts.ctypes.data, BLOCKS, (board.ctypes.data, 2, 4))
    assert counts.tolist() == [1] * len(counts)
    late: list[bool] = []
    thread = threading.Thread(target=lambda: late.append(count(counts.ctypes.data, BLOCKS, (board.ctypes.data, 0, 4))))
    thread.start()
    thread.join(10)
    assert late == [True]
    assert counts.tolist() == [1] * len(counts)


def test_a_helper_that_fails_costs_no_block(caplog: pytest.LogCaptureFixture) -> None:
    counts, failed = np.zeros(PHASES * BLOCKS, np.int64), threading.Event()

    def work(sharer: parallel.Sharer) -> None:
        if sharer[1]:
            failed.set()
            raise ValueError("broken")
        assert failed.wait(10)
        count(counts.ctypes.data, BLOCKS, sharer)

    parallel.share(work, PHASES, 2)
    assert counts.tolist() == [1] * len(counts)
    again = threading.Event()
    parallel.share(lambda sharer: again.set() if sharer[1] else None, 1, 2)
    assert again.wait(10)  # the helper lives on
    assert "failed in a helper" in caplog.text
