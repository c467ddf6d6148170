"""Where the engine's thread waits: everything other threads have for it arrives in one mailbox.

The engine drives its own few coroutines instead of running asyncio: between two awaits it computes for milliseconds,
and a loop that polls beside it costs more than the waiting itself. Only the engine's thread changes a Completion.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from consilium.errors import DeadlineExceeded

T = TypeVar("T")


class Completion(Generic[T]):
    """A result that another thread will post; engine coroutines await it."""

    __slots__ = ("_on_expiry", "deadline", "outcome")

    def __init__(self, deadline: float, on_expiry: Callable[[], None]) -> None:
        self.deadline = deadline  # on time.monotonic's clock
        self.outcome: T | Exception | None = None
        self._on_expiry = on_expiry

    def __await__(self) -> Generator[Completion[T], None, T]:
        while self.outcome is None:
            yield self
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def settle(self, outcome: T | Exception) -> None:
        """Set the outcome; the first one stands."""
        if self.outcome is None:
            self.outcome = outcome

    def expire(self) -> None:
        """Give up waiting."""
        self._on_expiry()
        self.settle(DeadlineExceeded("an expert worker did not answer in time"))


class Mailbox:
    """A queue into the engine's thread. ``post`` and ``settle`` may be called from any thread."""

    def __init__(self, handle: Callable[[object], None]) -> None:
        self._queue: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._handle = handle

    def post(self, event: object) -> None:
        """Hand ``event`` to the engine's handler."""
        self._queue.put(event)

    def settle(self, completion: Completion[T], outcome: T | Exception) -> None:
        """Give ``completion`` its outcome and wake whoever awaits it."""
        self._queue.put(lambda: completion.settle(outcome))

    def receive(self, timeout: float | None) -> bool:
        """Take one event, waiting up to ``timeout`` seconds (None: for ever, 0: not at all); False if none came."""
        try:
            event = self._queue.get(timeout=timeout) if timeout != 0 else self._queue.get_nowait()
        except queue.Empty:
            return False
        if callable(event):
            event()
        else:
            self._handle(event)
        return True

    def drive(self, coroutine: Coroutine[Completion[Any], None, T]) -> T:
        """Run ``coroutine`` to its end, taking events whenever it awaits."""
        while True:
            try:
                awaited = coroutine.send(None)
            except StopIteration as stop:
                result: T = stop.value
                return result
            while awaited.outcome is None:
                if not self.receive(max(0.0, awaited.deadline - time.monotonic())):
                    awaited.expire()
