"""Memory that two processes share: what is refused, what is seen by the other side, and who has which bytes."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import WireError
from consilium.shared_memory import ALIGNMENT, LARGEST, SEALS, Regions, SharedMemory

SIZE = 4096
sizes = st.integers(1, SIZE // 2)


def memfd(size: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


@pytest.fixture
def shared() -> Iterator[tuple[SharedMemory, int]]:
    memory, descriptor = SharedMemory.create(SIZE)
    yield memory, descriptor
    os.close(descriptor)


def test_both_sides_see_what_either_writes(shared: tuple[SharedMemory, int]) -> None:
    ours, descriptor = shared
    theirs = SharedMemory.attach(descriptor)
    assert theirs.size == SIZE
    ours.array((3,), np.uint8, 64)[:] = 7
    assert theirs.array((SIZE,), np.uint8, 0).sum() == 21
    theirs.array((64,), np.uint8, SIZE - 64)[:] = 1
    assert ours.array((SIZE,), np.uint8, 0).sum() == 85


def test_the_memory_outlives_its_descriptor() -> None:
    memory, descriptor = SharedMemory.create(SIZE)
    os.close(descriptor)
    memory.array((SIZE,), np.uint8, 0)[:] = 1
    assert memory.array((SIZE,), np.uint8, 0).sum() == SIZE


def test_a_view_outlives_its_memory() -> None:
    memory, descriptor = SharedMemory.create(SIZE)
    os.close(descriptor)
    rows = memory.tensor((2, 3), torch.float32, 64)
    del memory
    gc.collect()
    rows[:] = 1
    assert rows.sum() == 6


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_tensors_are_views_and_may_be_empty_at_the_very_end(
    shared: tuple[SharedMemory, int], dtype: torch.dtype
) -> None:
    memory, descriptor = shared
    rows = torch.arange(-6, 6).view(3, 4).to(dtype)
    memory.tensor((3, 4), dtype, 64).copy_(rows)
    assert SharedMemory.attach(descriptor).tensor((3, 4), dtype, 64).equal(rows)
    assert memory.tensor((0, 4), dtype, SIZE).shape == (0, 4)
    size = 12 * dtype.itemsize
    assert memory.array((size,), np.uint8, 64).tobytes() == rows.view(torch.uint8).numpy().tobytes()


def test_what_was_created_cannot_be_shortened(shared: tuple[SharedMemory, int]) -> None:
    _, descriptor = shared
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)


REFUSED: dict[str, tuple[Callable[[], int], str]] = {
    "a device": (lambda: os.open(os.devnull, os.O_RDWR), "no memfd"),
    "a pipe": (lambda: os.pipe()[0], "no memfd"),
    "not sealed": (lambda: memfd(SIZE, 0), "must be sealed"),
    "may shrink": (lambda: memfd(SIZE, SEALS & ~fcntl.F_SEAL_SHRINK), "must be sealed"),
    "may grow": (lambda: memfd(SIZE, SEALS & ~fcntl.F_SEAL_GROW), "must be sealed"),
    "more seals may come": (lambda: memfd(SIZE, SEALS & ~fcntl.F_SEAL_SEAL), "must be sealed"),
    "empty": (lambda: memfd(0, SEALS), "memfd of 0 bytes"),
    "too large": (lambda: memfd(LARGEST + 1, SEALS), f"memfd of {LARGEST + 1} bytes"),
    "not to be written": (lambda: memfd(SIZE, SEALS | fcntl.F_SEAL_WRITE), "cannot be mapped"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_other_descriptors_are_refused(make: Callable[[], int], said: str) -> None:
    descriptor = make()
    try:
        with pytest.raises(WireError, match=said):
            SharedMemory.attach(descriptor)
    finally:
        os.close(descriptor)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with (tmp_path / "file").open("r+b") as file, pytest.raises(WireError, match="no memfd"):
        SharedMemory.attach(file.fileno())


def test_a_descriptor_for_reading_alone_is_refused(shared: tuple[SharedMemory, int]) -> None:
    _, descriptor = shared
    reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    try:
        with pytest.raises(WireError, match="cannot be mapped"):
            SharedMemory.attach(reading)
    finally:
        os.close(reading)


INSIDE = [(0, SIZE), (0, 0), (SIZE - 64, SIZE), (SIZE, SIZE)]
NOT_INSIDE = [(1, 2), (32, 64), (SIZE, SIZE + 1), (0, SIZE + 1), (64, SIZE + 64), (2**64 - 64, 2**64), (0, 2**200)]


@pytest.mark.parametrize(("begin", "end"), INSIDE)
def test_what_is_all_inside_is_taken(shared: tuple[SharedMemory, int], begin: int, end: int) -> None:
    shared[0].check(begin, end)


@pytest.mark.parametrize(("begin", "end"), NOT_INSIDE)
def test_what_is_not_all_inside_is_refused(shared: tuple[SharedMemory, int], begin: int, end: int) -> None:
    with pytest.raises(WireError, match=f"the call's {end - begin} bytes at {begin} do not lie in .* of 4096 bytes"):
        shared[0].check(begin, end)


@given(st.lists(sizes | st.none(), max_size=60), st.randoms())
def test_regions_never_overlap_and_lie_inside(actions: list[int | None], random: object) -> None:
    """A number takes so many bytes, None gives something back."""
    regions, used = Regions(SIZE), dict[int, int]()
    for size in actions:
        if size is None:
            if used:
                begin = random.choice(sorted(used))  # type: ignore[attr-defined] # hypothesis's Random
                del used[begin]
                regions.free(begin)
            continue
        begin = regions.take(size)
        ends = [0] + [-(-(start + length) // ALIGNMENT) * ALIGNMENT for start, length in used.items()]
        if begin is None:  # no gap: it starts where something ends
            taken = [*sorted(used), SIZE]
            assert all(min(each for each in taken if each >= end) - end < size for end in ends if end <= SIZE)
            continue
        assert begin % ALIGNMENT == 0
        assert 0 <= begin <= SIZE - size
        assert all(begin + size <= start or start + length <= begin for start, length in used.items())
        used[begin] = size
    for begin in used:
        regions.free(begin)
    assert regions.take(SIZE) == 0


def test_freed_space_is_found_again() -> None:
    regions = Regions(3 * 64)
    assert [regions.take(64) for _ in range(4)] == [0, 64, 128, None]
    regions.free(64)
    assert regions.take(65) is None
    assert regions.take(1) == 64
    assert regions.take(1) is None, "the rest of what is in use is not given out: regions are aligned"
