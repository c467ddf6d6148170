"""The one thread that computes, and where it waits: for calls that gRPC's event loop hands over, and for local links.

Links are read on this thread itself: on one host the way through a second thread costs more than the socket.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from consilium.errors import ConsiliumError
from expert_service.call_queue import CallQueue, Job, Outcome
from expert_service.calls import Call
from expert_service.frame_computer import Begun, FrameComputer

logger = logging.getLogger(__name__)


class Link(Protocol):
    """A source of calls that the computing thread reads."""

    def fileno(self) -> int: ...

    def read(self) -> bool:
        """Submit what has come, without waiting; False when the link has ended."""
        ...

    def close(self) -> None: ...


class Executor:
    """Computes calls in the order of its queue."""

    def __init__(self, computer: FrameComputer, max_queue: int, max_bytes: int) -> None:
        """As the queue has it."""
        self._computer = computer
        self.on_done: Callable[[Job, Outcome], None] = lambda _job, _outcome: None  # told of every call, on the thread
        self.queue = CallQueue(max_queue, max_bytes)
        self.busy_seconds = 0.0  # that the thread has spent on calls, whatever became of them
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._links: dict[int, Link] = {}
        self._closing = False
        # A daemon: the process may have to leave while a call is still computed.
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Calls that wait or are computed."""
        return self.queue.unfinished

    def submit(self, call: Call, answer: Callable[[Outcome], object]) -> Job:
        """Queue a call; may be called by any thread. Raises TooLarge, or Overloaded when the queue is full."""
        job = Job(call, self._computer.size(call), answer)
        self.queue.add(job)
        if threading.current_thread() is not self._thread:
            os.eventfd_write(self._wake, 1)
        return job

    def add_link(self, link: Link) -> None:
        """Read ``link`` from now on until it ends; may be called by any thread."""
        self._links[link.fileno()] = link
        self._poll.register(link.fileno(), select.EPOLLIN)

    def close(self, seconds: float) -> bool:
        """End the thread once it has done what is queued; whether it has ended within ``seconds``."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP's number is each thread's own
        begun: deque[Begun] = deque()
        with torch.inference_mode():
            while len(self.queue) or not self._closing:
                self._read(None if not len(self.queue) else 0)
                jobs = self.queue.take(self._computer.max_batch)
                if jobs:
                    begun.append(self._begin(jobs))
                # A device goes on by itself: what waits is brought to it before the first is waited for.
                while begun and (len(begun) == self._computer.depth or not len(self.queue)):
                    self._finish(begun.popleft())
        for link in self._links.values():
            link.close()

    def _read(self, timeout: float | None) -> None:
        """Take in what links and other threads have, waiting for it up to ``timeout`` (None: for ever)."""
        for descriptor, _ in self._poll.poll(timeout):
            link = self._links.get(descriptor)
            if link is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif not link.read():
                self._poll.unregister(descriptor)
                del self._links[descriptor]
                link.close()

    def _begin(self, jobs: list[Job]) -> Begun:
        started = time.monotonic()
        try:
            return self._computer.begin(jobs)
        except Exception as error:  # a bug: these calls fail, the others go on
            begun = Begun(jobs)
            begun.fail(error)
            return begun
        finally:
            self.busy_seconds += time.monotonic() - started

    def _finish(self, begun: Begun) -> None:
        started, jobs = time.monotonic(), begun.jobs
        try:
            outcomes = self._computer.finish(begun)
        except Exception as error:
            outcomes = [error] * len(jobs)
        self.busy_seconds += time.monotonic() - started
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                if not isinstance(outcome, ConsiliumError):
                    logger.error("call for layer %d failed", job.call.layer, exc_info=outcome)
                outcome.__traceback__ = None  # its frames hold shared memory, and one of them holds the error
            job.answer(outcome)
            self.on_done(job, outcome)
            self.queue.done(job)
