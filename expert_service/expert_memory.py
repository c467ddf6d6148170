"""Where the weights of a call are while it is computed: all of them in memory, or a part, the others on disk.

With `worker.memory_limit` a fixed number of slots holds the experts that are asked for most (``residency``). A call
pins those of its experts that are in memory and computes them first; meanwhile a second thread reads the others. When
there is nothing left to compute, the computing thread reads, too. The kernel copies without the interpreter's lock.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.experts import ExpertWeights
from expert_service.paged_expert import PagedExpert
from expert_service.residency import Residency

logger = logging.getLogger(__name__)

Held = ExpertWeights | PagedExpert
Work = Callable[[int, list[ExpertWeights]], None]  # the place of the first of some adjacent experts, and their weights

# Passes over all layers after which having been asked for counts half; `python -m bench.tiers` compares.
HALF_LIFE = 32.0


@dataclass(slots=True)
class Traffic:
    """What a memory has counted since its start."""

    hits: int = 0  # experts that a call found in memory
    misses: int = 0
    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0
    evictions: int = 0


class ExpertMemory(Protocol):
    """Used by the one thread that computes."""

    traffic: Traffic

    def use(self, experts: Sequence[Held], work: Work) -> None:
        """Have ``work`` called until it was given every one of ``experts``, each once, in any order.

        Raises UnreadableWeights where one cannot be read, and what ``work`` raises.
        """
        ...


class AllInMemory:
    """Without a limit."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    def use(self, experts: Sequence[Held], work: Work) -> None:
        weights = [each for each in experts if isinstance(each, ExpertWeights)]
        if len(weights) < len(experts):
            raise TypeError("experts on disk need a LimitedMemory")
        self.traffic.hits += len(weights)
        work(0, weights)


class LimitedMemory:
    """Slots of one size for experts that lie on disk."""

    def __init__(self, slots: int, room: int, layers: int) -> None:
        """``slots`` (at least 1) of ``room`` bytes, for experts of so many ``layers``."""
        self.traffic, self.slots, self.room = Traffic(), slots, room
        self._arena = _huge_pages(slots * room).view(slots, room)
        self._residency = Residency[PagedExpert](slots, HALF_LIFE * layers)
        self._weights: dict[PagedExpert, ExpertWeights] = {}  # of what is in memory, and read
        self._failed: dict[PagedExpert, ConsiliumError] = {}
        self._reported = ""
        self._wanted: deque[PagedExpert] = deque()
        lock = threading.Lock()
        # Apart, so that nobody wakes a thread that has nothing to do.
        self._to_read, self._has_read = threading.Condition(lock), threading.Condition(lock)
        threading.Thread(target=self._read_on, name="reader", daemon=True).start()

    @property
    def resident(self) -> int:
        """Experts in memory."""
        return len(self._weights)

    def use(self, experts: Sequence[Held], work: Work) -> None:
        paged = [each for each in experts if isinstance(each, PagedExpert)]
        if len(paged) < len(experts):
            raise TypeError("a limited memory is for experts on disk")
        pending = list(range(len(paged)))
        self._ask(paged)
        try:
            while pending:
                ready, weights = self._next(paged, pending)
                work(ready[0], weights)
                self._release([paged[place] for place in ready])
                del pending[pending.index(ready[0]) : pending.index(ready[-1]) + 1]
        finally:
            if pending:
                self._give_up([paged[place] for place in pending])

    def forget(self, expert: PagedExpert) -> None:
        """This worker holds it no more; any thread may say so."""
        with self._to_read:
            self._residency.forget(expert)

    def _ask(self, experts: Sequence[PagedExpert]) -> None:
        """Pin what is in memory, and have the rest read."""
        with self._to_read:
            self._residency.touch(experts)
            for expert in experts:
                self._residency.pin(expert)
            missing = [expert for expert in experts if expert not in self._residency]
            for expert in missing:
                self._failed.pop(expert, None)  # a new attempt
            self.traffic.hits += len(experts) - len(missing)
            self.traffic.misses += len(missing)
            self._wanted.extend(missing)
            if len(missing) > 1:  # a single one is read by this thread, at once
                self._to_read.notify()
        for expert in missing[1:]:
            expert.advise()

    def _next(self, experts: Sequence[PagedExpert], pending: Sequence[int]) -> tuple[list[int], list[ExpertWeights]]:
        """Adjacent places of ``pending`` whose weights are in memory; reads some itself rather than wait."""
        while True:
            with self._has_read:
                ready = self._ready(experts, pending)
                if ready:
                    return ready, [self._weights[experts[place]] for place in ready]
                started = self._begin()
                if started is None:
                    self._has_read.wait()
                    continue
            self._read(*started)

    def _ready(self, experts: Sequence[PagedExpert], pending: Sequence[int]) -> list[int]:
        """The first adjacent places. Raises the error of what could not be read."""
        found: list[int] = []
        for place in pending:
            if experts[place] in self._failed:
                raise self._failed[experts[place]]
            if experts[place] in self._weights and (not found or place == found[-1] + 1):
                found.append(place)
            elif found:
                break
        return found

    def _begin(self) -> tuple[PagedExpert, int] | None:
        """What is to be read next, and the slot for it, taken; the lock is held."""
        taken = self._residency.take(self._wanted[0]) if self._wanted else None
        if taken is None:
            return None
        slot, former = taken
        if former is not None:
            self._weights.pop(former)
            self.traffic.evictions += 1
        expert = self._wanted.popleft()
        self._residency.pin(expert)  # as long as it is read, even if its call is given up
        return expert, slot

    def _read(self, expert: PagedExpert, slot: int) -> None:
        try:
            weights = expert.read(self._arena[slot])
        except ConsiliumError as error:
            with self._has_read:
                self._residency.unpin(expert)
                self._residency.give_up(expert)
                self._failed[expert] = error
                if error.message != self._reported:  # once, not for every call
                    logger.error("%s", error.message)
                self._reported = error.message
                self.traffic.failed_reads += 1
                self._has_read.notify()
            return
        with self._has_read:
            self._residency.unpin(expert)
            self._weights[expert] = weights
            self.traffic.reads += 1
            self.traffic.read_bytes += expert.room
            self._has_read.notify()

    def _release(self, experts: Sequence[PagedExpert]) -> None:
        with self._to_read:
            for expert in experts:
                self._residency.unpin(expert)
            if self._wanted:
                self._to_read.notify()

    def _give_up(self, experts: Sequence[PagedExpert]) -> None:
        """What a call that failed did not come to."""
        self._wanted.clear()
        self._release(experts)

    def _read_on(self) -> None:
        """The reading thread, to the end of the process."""
        while True:
            with self._to_read:
                while (started := self._begin()) is None:
                    self._to_read.wait()
            self._read(*started)


def _huge_pages(nbytes: int) -> Tensor:
    """Memory uint8 [nbytes] whose pages are committed as they are written, large ones where the system has them."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8, nbytes))
