"""One batch on its way to a device, through its kernels, and back.

Letters: U rows, P pairs, M experts, D hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.experts import ExpertWeights
from consilium.gpu.experts import ExpertForm, compute, table_of
from consilium.gpu.jit import power_of_two
from consilium.gpu.sort import Groups
from consilium.gpu.staging import Buffer, pack, starts_of, views
from consilium.gpu.tiling import Batch, Tilings, nearest


@dataclass(frozen=True, slots=True)
class Work:
    """Pairs ``start`` to ``end`` of a call, all of it on the host; ``out`` is where the rows of just those go."""

    experts: Sequence[ExpertWeights]
    offsets: Sequence[int]
    rows: Tensor  # [U, D]
    scales: Tensor | None  # [U]
    indices: Tensor | None  # [all pairs] int32
    out: Tensor  # [end - start, D]
    start: int
    end: int

    def ranges(self) -> tuple[list[ExpertWeights], NDArray[np.int32]]:
        """The experts that have any of these pairs, and their first and last + 1 ones among these: [M, 2]."""
        bounds = np.clip(np.array(self.offsets, np.int32), self.start, self.end) - self.start
        held = np.flatnonzero(bounds[1:] > bounds[:-1])
        return [self.experts[each] for each in held.tolist()], np.stack((bounds[held], bounds[held + 1]), axis=1)

    def source(self) -> Tensor:
        """The rows of these pairs: int32 [P]."""
        if self.indices is None:
            return torch.arange(self.start, self.end, dtype=torch.int32)
        return self.indices[self.start : self.end]

    def halves(self) -> tuple[Work, Work]:
        """Two that come to the same."""
        middle = (self.start + self.end) // 2
        before, after = self.out.split([middle - self.start, self.end - middle])
        fixed = self.experts, self.offsets, self.rows, self.scales, self.indices
        return Work(*fixed, before, self.start, middle), Work(*fixed, after, middle, self.end)


class Lane:
    """Buffers and a stream for one batch at a time. Several lanes overlap copies with computing."""

    def __init__(self, form: ExpertForm, tilings: Tilings, device: torch.device) -> None:
        self._form, self._tilings, self._device = form, tilings, device
        self._up, self._there, self._back = Buffer(device, pinned=True), Buffer(device), Buffer(device, pinned=True)
        self._clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._places = torch.empty(0, dtype=torch.int32)
        self._work: Work | None = None
        self._found = torch.empty(0)

    def begin(self, work: Work) -> None:
        """Set ``work`` going. Raises torch.OutOfMemoryError, and then nothing of it goes on."""
        try:
            self._begin(work)
        except torch.OutOfMemoryError:
            if self._stream is not None:
                self._stream.synchronize()  # what was begun may still read the staged bytes
            raise

    def _begin(self, work: Work) -> None:
        experts, ranges = work.ranges()
        tiling = nearest(self._tilings, Batch(len(experts), (work.end - work.start) / len(experts)))
        tiles = torch.from_numpy(cut(ranges, tiling.block_m))
        sent = [table_of(self._form, experts), tiles, work.source(), work.rows]
        sent += [] if work.scales is None else [work.scales]
        starts = starts_of(sent)
        staged = self._up.take(starts[-1])
        pack(sent, staged, starts)
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            self._clock.start()
            there = self._there.take(starts[-1])
            out = torch.empty(work.out.shape, dtype=work.out.dtype, device=self._device)
            there.copy_(staged, non_blocking=True)
            table, on_tiles, source, rows, *scales = views(sent, there, starts)
            groups = Groups(source, self._first(len(source)), on_tiles, tiling.block_m)
            compute(self._form, tiling, table, groups, rows, scales[0] if scales else None, out)
            self._found = self._back.take(out.nbytes).view(out.dtype).view(out.shape)
            self._found.copy_(out, non_blocking=True)
            self._clock.stop()
        self._work = work

    def _first(self, count: int) -> Tensor:
        """0, 1, …: the rows of a call come back in the order of its pairs."""
        if len(self._places) < count:
            self._places = torch.arange(power_of_two(count), dtype=torch.int32, device=self._device)
        return self._places[:count]

    def finish(self) -> float:
        """Wait, and put the rows where they belong; the seconds that the device was at it."""
        seconds = self._clock.wait()
        if self._work is not None:
            self._work.out.copy_(self._found)
        self._work = None  # its weights may be dropped now
        return seconds


def cut(ranges: NDArray[np.int32], block: int) -> NDArray[np.int32]:
    """Tiles (expert, first, last + 1) of at most ``block`` pairs: [S, 3], from the ranges [M, 2] of experts."""
    counts = -(-(ranges[:, 1] - ranges[:, 0]) // block)  # [M]
    expert = np.repeat(np.arange(len(ranges), dtype=np.int32), counts)  # [S]
    within = np.arange(len(expert), dtype=np.int32) - np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
    first = ranges[expert, 0] + within * np.int32(block)
    return np.stack((expert, first, np.minimum(first + np.int32(block), ranges[expert, 1])), axis=1)


class _DeviceClock:
    """Time on the current stream."""

    def __init__(self) -> None:
        self._began, self._done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        self._began.record()

    def stop(self) -> None:
        self._done.record()

    def wait(self) -> float:
        self._done.synchronize()
        return float(self._began.elapsed_time(self._done)) / 1e3


class _HostClock:
    """Time where everything has happened when it is asked for."""

    def __init__(self) -> None:
        self._began = self._done = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._done = time.perf_counter()

    def wait(self) -> float:
        return self._done - self._began
