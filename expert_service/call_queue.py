"""Calls that wait to be computed: bounded, single tokens before prompts, calls for one layer together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from consilium.errors import Cancelled, DeadlineExceeded, Overloaded
from expert_service.calls import Call, Computed

# So many times in a row may decode pass prompts that wait; then they have their turn.
MOST_OVERTAKEN = 8

Outcome = Computed | Exception


@dataclass(slots=True, eq=False)
class Job:
    """One call that was taken. ``answer`` is called once, on the thread that computes."""

    call: Call
    size: int  # bytes, with those of its result
    answer: Callable[[Outcome], object]
    received: float = field(default_factory=time.monotonic)
    cancelled: bool = False  # nobody wants the answer any more; it may be set by any thread

    def check(self) -> None:
        """Raises when nobody wants the answer any more."""
        if self.cancelled:
            raise Cancelled("cancelled by its caller before it was computed")
        limit = self.call.deadline_ms
        if limit and time.monotonic() > self.received + limit / 1e3:
            raise DeadlineExceeded(f"not answered within its {limit} ms; this worker is overloaded")


class CallQueue:
    """May be used by any thread."""

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        """``max_calls`` calls, and ``max_bytes`` of calls with their results, may be unfinished at a time."""
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self.unfinished, self._bytes = 0, 0  # taken out, but not yet done, included
        self._decode: deque[Job] = deque()
        self._prefill: deque[Job] = deque()
        self._overtaken = 0
        self._lock = threading.Lock()
        self._when_empty: Callable[[], object] | None = None

    def __len__(self) -> int:
        return len(self._decode) + len(self._prefill)

    def add(self, job: Job) -> None:
        """Raises Overloaded when the queue is full."""
        with self._lock:
            if self.unfinished >= self._max_calls or self._bytes + job.size > self._max_bytes:
                raise Overloaded(
                    f"{self.unfinished} calls of {self._bytes} bytes wait already; try again a little later"
                )
            self.unfinished += 1
            self._bytes += job.size
            (self._prefill if job.call.prefill else self._decode).append(job)

    def take(self, most_pairs: int) -> list[Job]:
        """The next job, and others of its kind that share experts with it, up to ``most_pairs`` in all.

        Jobs that share none are left apart: they read no weights twice, and the first one's rows need not wait.
        Those that were cancelled come before all others. Nothing when the queue is empty.
        """
        with self._lock:
            cancelled = [job for waiting in (self._decode, self._prefill) for job in waiting if job.cancelled]
            if cancelled:
                self._remove(cancelled)
                return cancelled
            passes = self._decode and not (self._prefill and self._overtaken >= MOST_OVERTAKEN)
            self._overtaken = self._overtaken + 1 if passes and self._prefill else 0
            waiting = self._decode if passes else self._prefill
            if not waiting:
                return []
            taken = [waiting.popleft()]
            pairs, kept = taken[0].call.pairs, deque[Job]()
            while waiting and pairs < most_pairs:
                job = waiting.popleft()
                if pairs + job.call.pairs <= most_pairs and any(_share_experts(job, each) for each in taken):
                    taken.append(job)
                    pairs += job.call.pairs
                else:
                    kept.append(job)
            waiting.extendleft(reversed(kept))
            return taken

    def _remove(self, jobs: list[Job]) -> None:
        for job in jobs:
            (self._prefill if job.call.prefill else self._decode).remove(job)

    def done(self, job: Job) -> None:
        """A job that was taken is answered, or will not be."""
        with self._lock:
            self.unfinished -= 1
            self._bytes -= job.size
            notify = self._when_empty if not self.unfinished else None
        if notify is not None:
            notify()

    def when_empty(self, notify: Callable[[], object]) -> None:
        """Have ``notify`` called as soon as nothing is unfinished, perhaps at once, by whichever thread sees it."""
        with self._lock:
            self._when_empty = notify
            empty = not self.unfinished
        if empty:
            notify()


def _share_experts(job: Job, other: Job) -> bool:
    if job.call.layer != other.call.layer:
        return False
    return not set(job.call.experts).isdisjoint(other.call.experts)
