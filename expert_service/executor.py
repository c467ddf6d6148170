"""A bounded queue of calls and the one thread that computes them, so that the event loop is always free.

All methods run on the event loop; only :meth:`Executor._work` and below run on the thread.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from dataclasses import dataclass

import torch

from consilium.errors import ConsiliumError, DeadlineExceeded, Overloaded
from expert_service.frame_computer import FrameComputer
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)

Answer = asyncio.Future[expert_pb2.Result]


@dataclass(frozen=True, slots=True)
class _Job:
    call: expert_pb2.Call
    answer: Answer
    size: int  # bytes of the call and of its result
    received: float  # monotonic seconds
    deadline: float | None

    def check(self) -> None:
        """Raises when nobody wants the answer any more."""
        if self.answer.cancelled():
            raise _CancelledError
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded(f"not answered within its {self.call.deadline_ms} ms; this worker is overloaded")


class _CancelledError(Exception):
    """The caller gave the call up; nothing is answered."""


class Executor:
    """Computes calls one after another, in the order they came."""

    def __init__(self, computer: FrameComputer, max_queue: int, max_bytes: int) -> None:
        """``max_queue`` calls, and ``max_bytes`` of calls with their results, may be unfinished at a time."""
        self._computer = computer
        self._max_queue, self._max_bytes = max_queue, max_bytes
        self._waiting, self._waiting_bytes = 0, 0
        self.busy_seconds = 0.0  # that the thread has spent on calls, whatever became of them
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        # A daemon: the process may have to leave while a call is still computed.
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Calls that wait or are computed."""
        return self._waiting

    def submit(self, call: expert_pb2.Call) -> Answer:
        """Queue a call; cancel the future to give it up. Raises TooLarge, or Overloaded when the queue is full."""
        size = self._computer.result_bytes(call) + call.ByteSize()
        if self._waiting >= self._max_queue or self._waiting_bytes + size > self._max_bytes:
            raise Overloaded(
                f"{self._waiting} calls of {self._waiting_bytes} bytes wait already; try again a little later"
            )
        now = time.monotonic()
        deadline = now + call.deadline_ms / 1e3 if call.deadline_ms else None
        job = _Job(call, self._loop.create_future(), size, now, deadline)
        self._waiting += 1
        self._waiting_bytes += size
        self._jobs.put(job)
        return job.answer

    def close(self, seconds: float) -> bool:
        """End the thread once it has done what is queued; whether it has ended within ``seconds``."""
        self._jobs.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _settle(self, job: _Job, outcome: expert_pb2.Result | Exception) -> None:
        self._waiting -= 1
        self._waiting_bytes -= job.size
        if job.answer.done():  # given up
            return
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)

    def _work(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP's number is each thread's own
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                started = time.monotonic()
                outcome = self._run(job)
                self.busy_seconds += time.monotonic() - started
                self._loop.call_soon_threadsafe(self._settle, job, outcome)

    def _run(self, job: _Job) -> expert_pb2.Result | Exception:
        try:
            job.check()
            return self._computer.compute(job.call, job.received, job.check)
        except (ConsiliumError, _CancelledError) as error:
            return error
        except Exception as error:  # a bug, or out of memory: this call fails, the others go on
            logger.exception("call for layer %d failed", job.call.layer)
            return error
