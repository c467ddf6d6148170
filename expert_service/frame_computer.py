"""From the messages of calls to the messages of their results.

Letters: U distinct token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.attachment import Attachment
from consilium.errors import StalePlacement, TooLarge, WireError
from consilium.experts import Arithmetic, ExpertWeights
from consilium.frames import Frame, decode_call, encode_result, shared_bytes
from consilium.shared_memory import SharedMemory
from consilium.units import format_size
from consilium.wire import Memory, nbytes
from expert_service.call_queue import Job, Outcome
from expert_service.coalesce import merge
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2

INDEX_BYTES = torch.int32.itemsize


@dataclass(frozen=True, slots=True)
class _Task:
    """A job that is in order: what it asks for, and where its output rows [P, D] go."""

    place: int  # among the jobs
    frame: Frame
    experts: list[ExpertWeights]
    rows: Tensor


class FrameComputer:
    """Decodes calls, computes them in batches of at most ``max_batch`` pairs, and encodes the results."""

    def __init__(
        self, store: ExpertStore, arithmetic: Arithmetic, hidden_size: int, max_batch: int, max_frame: int
    ) -> None:
        self._store, self._arithmetic = store, arithmetic
        self._hidden_size, self.max_batch, self._max_frame = hidden_size, max_batch, max_frame

    def sizes(self, call: expert_pb2.Call, memory: Memory | None = None) -> tuple[int, int, int]:
        """Rows of the call's result as the call says, bytes of the call, and those with the rows of its result.

        What is attached counts as it is, what lies in shared memory as the call says.

        Raises TooLarge when one of them passes the largest frame.
        """
        pairs = nbytes(call.indices) // INDEX_BYTES
        size = pairs * self._hidden_size * self._arithmetic.reply_dtype.itemsize
        beside = memory.size if isinstance(memory, Attachment) else shared_bytes(call)
        received = call.ByteSize() + beside
        for what, found in (("call", received), (f"result of {pairs} rows", size)):
            if found > self._max_frame:
                raise TooLarge(
                    f"the {what} takes {found} bytes, more than this worker's largest frame of "
                    f"{format_size(self._max_frame)}; send fewer rows, or raise worker.max_frame"
                )
        return pairs, received, received + size

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
            job = jobs[task.place]
            offset = job.call.result_offset if job.call.HasField("result_offset") else None
            attach = None if job.parts is None else job.parts.place
            outcomes[task.place] = encode_result(task.rows, started - job.received, seconds, offset, attach)
        return [outcome for outcome in outcomes if outcome is not None]

    def _task(self, place: int, job: Job) -> _Task:
        """Raises WireError, StalePlacement."""
        frame = decode_call(job.call, self._hidden_size, self._arithmetic.row_dtype, job.memory)
        if job.call.weight_version:
            raise StalePlacement(
                f"this worker has no weight version {job.call.weight_version!r}; leave the field empty"
            )
        return _Task(place, frame, self._store.find(frame.layer, frame.experts), self._room(job, frame))

    def _room(self, job: Job, frame: Frame) -> Tensor:
        """Where the output rows [P, D] go: shared memory, where the caller made room there. Raises WireError."""
        shape, dtype = (frame.indices.numel(), self._hidden_size), self._arithmetic.reply_dtype
        if not job.call.HasField("result_offset"):
            return torch.empty(shape, dtype=dtype)
        if not isinstance(job.memory, SharedMemory):
            raise WireError("result_offset: there is no shared memory here")
        size = shape[0] * shape[1] * dtype.itemsize
        return job.memory.view(job.call.result_offset, size, "result_offset").view(dtype).view(shape)

    def _compute(self, task: _Task, job: Job) -> None:
        for start in range(0, len(task.rows), self.max_batch):
            job.check()
            end = min(start + self.max_batch, len(task.rows))
            self._compute_batch(task.frame, task.experts, task.rows[start:end], start)

    def _compute_together(self, tasks: list[_Task]) -> None:
        """Frames that fit into one batch: the experts that several of them ask for are read once."""
        merged, places = merge([task.frame for task in tasks])
        found = torch.empty(merged.indices.numel(), self._hidden_size, dtype=self._arithmetic.reply_dtype)
        if len(found):
            self._compute_batch(merged, self._store.find(merged.layer, merged.experts), found, 0)
        for task, own in zip(tasks, places, strict=True):
            torch.index_select(found, 0, own, out=task.rows)

    def _compute_batch(self, frame: Frame, experts: list[ExpertWeights], out: Tensor, start: int) -> None:
        """The output rows of the pairs from ``start`` on, into ``out``."""
        end = start + len(out)
        offsets = [min(max(offset, start), end) - start for offset in frame.offsets]
        self._arithmetic.compute(experts, offsets, frame.rows, frame.scales, out, frame.indices[start:end])
