"""From calls to the rows of their results.

Letters: U distinct token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from consilium.errors import TooLarge
from consilium.experts import Arithmetic, ExpertWeights
from consilium.frames import Frame
from consilium.link_packets import RowFormat
from consilium.units import format_size
from expert_service.call_queue import Job, Outcome
from expert_service.calls import LONGEST_US, Call, Computed
from expert_service.coalesce import merge
from expert_service.expert_memory import AllInMemory, ExpertMemory, Held
from expert_service.store import ExpertStore

End = Callable[[], None]


@runtime_checkable
class Overlapping(Protocol):
    """An arithmetic that goes on by itself, so that the next batch can be brought to it meanwhile."""

    def begin(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor,
        indices: Tensor | None,
    ) -> End:
        """As ``compute``; ``out`` is filled when what is returned was called, in the order of begins."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A job that is in order: what it asks for, and where its output rows [P, D] go."""

    place: int  # among the jobs
    frame: Frame
    experts: list[Held]
    rows: Tensor


@dataclass(slots=True)
class Begun:
    """Jobs that are computed, and what is left to do for them."""

    jobs: list[Job]
    started: float = field(default_factory=time.monotonic)
    tasks: list[_Task] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)  # to be called in this order
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by place among the jobs

    def fail(self, error: Exception) -> None:
        """All that have no outcome yet."""
        for place in range(len(self.jobs)):
            self.outcomes.setdefault(place, error)


class FrameComputer:
    """Decodes calls, and computes them in batches of at most ``max_batch`` pairs."""

    def __init__(
        self,
        store: ExpertStore,
        arithmetic: Arithmetic,
        hidden_size: int,
        max_batch: int,
        max_frame: int,
        memory: ExpertMemory | None = None,
    ) -> None:
        """``memory`` is where the store's experts are while they are used: without a limit by default."""
        self._store, self._arithmetic, self._memory = store, arithmetic, memory or AllInMemory()
        self.form = RowFormat(hidden_size, arithmetic.row_dtype, arithmetic.reply_dtype)
        self.max_batch, self._max_frame = max_batch, max_frame
        self.depth = 2 if isinstance(arithmetic, Overlapping) else 1  # begins before the first one is finished

    def size(self, call: Call) -> int:
        """Bytes of the call with the rows of its result. Raises TooLarge when one of them passes the largest frame."""
        result = call.pairs * self.form.hidden_size * self.form.replies.itemsize
        for what, found in (("call", call.nbytes), (f"result of {call.pairs} rows", result)):
            if found > self._max_frame:
                raise TooLarge(
                    f"the {what} takes {found} bytes, more than this worker's largest frame of "
                    f"{format_size(self._max_frame)}; send fewer rows, or raise worker.max_frame"
                )
        return call.nbytes + result

    def compute(self, jobs: Sequence[Job]) -> list[Outcome]:
        """What each of ``jobs``, which are for one layer, comes to."""
        return self.finish(self.begin(jobs))

    def begin(self, jobs: Sequence[Job]) -> Begun:
        """Compute ``jobs``, which are for one layer, or set a device to it; :meth:`finish` has what they come to.

        An error of one of them changes nothing for the others. Whether a job is still wanted is looked at before each
        batch.
        """
        begun = Begun(list(jobs))
        for place, job in enumerate(jobs):
            try:
                job.check()
                begun.tasks.append(self._task(place, job))
            except Exception as error:  # an outcome like others; the executor logs what is a bug
                begun.outcomes[place] = error
        try:
            if len(begun.tasks) == 1:
                self._compute(begun)
            elif begun.tasks:
                self._compute_together(begun)
        except Exception as error:
            begun.fail(error)
        return begun

    def finish(self, begun: Begun) -> list[Outcome]:
        """Wait for what :meth:`begin` began; the outcomes of its jobs."""
        for end in begun.ends:
            try:
                end()
            except Exception as error:  # the other ends give back what they hold
                begun.fail(error)
        seconds = time.monotonic() - begun.started
        for task in begun.tasks:
            waited = begun.started - begun.jobs[task.place].received
            done = Computed(task.rows, _microseconds(waited), _microseconds(seconds))
            begun.outcomes.setdefault(task.place, done)
        return [begun.outcomes[place] for place in range(len(begun.jobs))]

    def _task(self, place: int, job: Job) -> _Task:
        """Raises WireError, StalePlacement."""
        frame = job.call.frame(self.form)
        return _Task(place, frame, self._store.find(frame.layer, frame.experts), job.call.room(self.form))

    def _compute(self, begun: Begun) -> None:
        task = begun.tasks[0]
        for start in range(0, len(task.rows), self.max_batch):
            begun.jobs[task.place].check()
            end = min(start + self.max_batch, len(task.rows))
            begun.ends.append(self._compute_batch(task.frame, task.experts, task.rows[start:end], start))

    def _compute_together(self, begun: Begun) -> None:
        """Frames that fit into one batch: the experts that several of them ask for are read once."""
        merged, places = merge([task.frame for task in begun.tasks])
        found = torch.empty(merged.indices.numel(), self.form.hidden_size, dtype=self.form.replies)
        if len(found):
            experts = self._store.find(merged.layer, merged.experts)
            begun.ends.append(self._compute_batch(merged, experts, found, 0))

        def distribute() -> None:
            for task, own in zip(begun.tasks, places, strict=True):
                torch.index_select(found, 0, own, out=task.rows)

        begun.ends.append(distribute)

    def _compute_batch(self, frame: Frame, experts: list[Held], out: Tensor, start: int) -> End:
        """The output rows of the pairs from ``start`` on are in ``out`` once what is returned was called."""
        end = start + len(out)
        bounds = [min(max(offset, start), end) - start for offset in frame.offsets]
        chosen = [place for place, (first, last) in enumerate(pairwise(bounds)) if first < last]
        offsets, indices = [*(bounds[place] for place in chosen), len(out)], frame.indices[start:end]
        ends: list[End] = []

        def work(place: int, weights: list[ExpertWeights]) -> None:
            own, target, chosen_rows = offsets, out, indices
            if len(weights) < len(chosen):
                first, last = offsets[place], offsets[place + len(weights)]
                own = [offset - first for offset in offsets[place : place + len(weights) + 1]]
                target, chosen_rows = out[first:last], indices[first:last]
            given = weights, own, frame.rows, frame.scales, target, chosen_rows
            if isinstance(self._arithmetic, Overlapping):
                ends.append(self._arithmetic.begin(*given))  # all weights are in memory: this is called once
            else:
                self._arithmetic.compute(*given)

        self._memory.use([experts[place] for place in chosen], work)
        return ends[0] if ends else _nothing


def _nothing() -> None:
    """What is left to do of a batch that was computed at once."""


def _microseconds(seconds: float) -> int:
    """A worker that was stopped for an hour still answers."""
    return min(int(seconds * 1e6), LONGEST_US)
