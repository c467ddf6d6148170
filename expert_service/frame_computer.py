"""From calls to the rows of their results.

Letters: U distinct token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

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
from expert_service.store import ExpertStore


@dataclass(frozen=True, slots=True)
class _Task:
    """A job that is in order: what it asks for, and where its output rows [P, D] go."""

    place: int  # among the jobs
    frame: Frame
    experts: list[ExpertWeights]
    rows: Tensor


class FrameComputer:
    """Decodes calls, and computes them in batches of at most ``max_batch`` pairs."""

    def __init__(
        self, store: ExpertStore, arithmetic: Arithmetic, hidden_size: int, max_batch: int, max_frame: int
    ) -> None:
        self._store, self._arithmetic = store, arithmetic
        self.form = RowFormat(hidden_size, arithmetic.row_dtype, arithmetic.reply_dtype)
        self.max_batch, self._max_frame = max_batch, max_frame

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
        """What each of ``jobs``, which are for one layer, comes to.

        An error of one of them changes nothing for the others. Whether a job is still wanted is looked at before each
        batch.
        """
        outcomes: list[Outcome | None] = [None] * len(jobs)
        started, tasks = time.monotonic(), list[_Task]()
        for place, job in enumerate(jobs):
            try:
                job.check()
                tasks.append(self._task(place, job))
            except Exception as error:  # an outcome like others; the executor logs what is a bug
                outcomes[place] = error
        try:
            if len(tasks) == 1:
                self._compute(tasks[0], jobs[tasks[0].place])
            elif tasks:
                self._compute_together(tasks)
        except Exception as error:
            return [outcome or error for outcome in outcomes]
        seconds = time.monotonic() - started
        for task in tasks:
            waited = started - jobs[task.place].received
            outcomes[task.place] = Computed(task.rows, _microseconds(waited), _microseconds(seconds))
        return [outcome for outcome in outcomes if outcome is not None]

    def _task(self, place: int, job: Job) -> _Task:
        """Raises WireError, StalePlacement."""
        frame = job.call.frame(self.form)
        return _Task(place, frame, self._store.find(frame.layer, frame.experts), job.call.room(self.form))

    def _compute(self, task: _Task, job: Job) -> None:
        for start in range(0, len(task.rows), self.max_batch):
            job.check()
            end = min(start + self.max_batch, len(task.rows))
            self._compute_batch(task.frame, task.experts, task.rows[start:end], start)

    def _compute_together(self, tasks: list[_Task]) -> None:
        """Frames that fit into one batch: the experts that several of them ask for are read once."""
        merged, places = merge([task.frame for task in tasks])
        found = torch.empty(merged.indices.numel(), self.form.hidden_size, dtype=self.form.replies)
        if len(found):
            self._compute_batch(merged, self._store.find(merged.layer, merged.experts), found, 0)
        for task, own in zip(tasks, places, strict=True):
            torch.index_select(found, 0, own, out=task.rows)

    def _compute_batch(self, frame: Frame, experts: list[ExpertWeights], out: Tensor, start: int) -> None:
        """The output rows of the pairs from ``start`` on, into ``out``."""
        end = start + len(out)
        offsets = [min(max(offset, start), end) - start for offset in frame.offsets]
        self._arithmetic.compute(experts, offsets, frame.rows, frame.scales, out, frame.indices[start:end])


def _microseconds(seconds: float) -> int:
    """A worker that was stopped for an hour still answers."""
    return min(int(seconds * 1e6), LONGEST_US)
