from __future__ import annotations

import threading

import pytest
import torch

from consilium import parallel


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def test_every_slice_runs_the_last_one_here() -> None:
    ran: dict[int, int] = {}

    def slice_of(number: int) -> None:
        ran[number] = threading.get_ident()

    parallel.run([lambda number=number: slice_of(number) for number in range(4)])  # type: ignore[misc]
    assert sorted(ran) == [0, 1, 2, 3]
    assert ran[3] == threading.get_ident()
    assert ran[0] != threading.get_ident()


@pytest.mark.parametrize("fails", [0, 2])
def test_an_error_waits_for_the_slices_that_still_run(fails: int) -> None:
    """Their memory is the caller's, which goes with the error."""
    last_began, ended = threading.Event(), threading.Event()

    def fail() -> None:
        raise ValueError("broken")

    def slow() -> None:
        last_began.wait(10)
        ended.set()

    def last() -> None:
        last_began.set()
        if fails == 2:
            fail()

    with pytest.raises(ValueError, match="broken"):
        parallel.run([fail if fails == 0 else (lambda: None), slow, last])
    assert ended.is_set()


def test_little_work_stays_on_one_thread() -> None:
    assert parallel.count_slices(1000) == 1
    assert parallel.count_slices(2 * parallel.WORTH) == 2
    assert parallel.count_slices(100 * parallel.WORTH) == 2
