"""Where the engine's thread waits: everything other threads have for it arrives in one mailbox.

The engine drives its own few coroutines instead of running asyncio: between two awaits it computes for milliseconds,
and a loop that polls beside it costs more than the waiting itself. Only the engine's thread changes a Completion.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Sequence
from math import inf
from typing import Any, Generic, Protocol, TypeVar

from consilium.errors import DeadlineExceeded

T = TypeVar("T")


class Awaited(Protocol):
    """What an engine coroutine may wait for."""

    deadline: float  # on time.monotonic's clock

    @property
    def outcome(self) -> object | None:
        """None while it is to be waited for."""
        ...

    def expire(self) -> None:
        """The deadline has come."""
        ...


class Completion(Generic[T]):
    """A result that another thread will post; engine coroutines await it."""

    __slots__ = ("_on_expiry", "_on_withdrawal", "_then", "deadline", "outcome")

    def __init__(
        self, deadline: float, on_expiry: Callable[[], None], on_withdrawal: Callable[[], None] | None = None
    ) -> None:
        self.deadline = deadline  # on time.monotonic's clock
        self.outcome: T | Exception | None = None
        self._on_expiry, self._on_withdrawal = on_expiry, on_withdrawal
        self._then: Callable[[T | Exception], None] | None = None

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
            if self._then is not None:
                self._then(outcome)

    def hand_over(self, then: Callable[[T | Exception], None]) -> None:
        """Nobody will await it: have ``then`` told of the outcome, at once if it is there."""
        self._then = then
        if self.outcome is not None:
            then(self.outcome)

    def withdraw(self) -> None:
        """Say where it comes from that nobody wants it any more; there is an outcome all the same, perhaps sooner."""
        if self.outcome is None and self._on_withdrawal is not None:
            self._on_withdrawal()

    def expire(self) -> None:
        """Give up waiting."""
        self._on_expiry()
        self.settle(DeadlineExceeded("an expert worker did not answer in time"))


class FirstOf:
    """Awaited until one of several completions has an outcome, or until ``wake`` on time.monotonic's clock."""

    __slots__ = ("_completions", "_woken", "deadline")

    def __init__(self, completions: Collection[Completion[Any]], wake: float = inf) -> None:
        self._completions, self._woken = completions, False
        self.deadline = min([wake, *(each.deadline for each in completions)])

    @property
    def outcome(self) -> object | None:
        return True if self._woken or any(each.outcome is not None for each in self._completions) else None

    def __await__(self) -> Generator[FirstOf, None, None]:
        while self.outcome is None:
            yield self

    def expire(self) -> None:
        """Wake up; completions whose own deadline has come expire."""
        self._woken, now = True, time.monotonic()
        for each in self._completions:
            if each.outcome is None and each.deadline <= now:
                each.expire()


class Mailbox:
    """Where the engine's thread gets everything from. ``post``, ``settle`` and ``watch`` may be called from any thread.

    Local links are read by the engine's thread itself: a second thread between would cost more than the socket.
    """

    def __init__(self, handle: Callable[[object], None]) -> None:
        self._events: deque[object] = deque()
        self._handle = handle
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._asleep = False
        self._poll = select.epoll()
        self._poll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, Callable[[], None]] = {}

    def post(self, event: object) -> None:
        """Hand ``event`` to the engine's handler."""
        self._events.append(event)
        if self._asleep:
            os.eventfd_write(self._wake, 1)

    def settle(self, completion: Completion[T], outcome: T | Exception) -> None:
        """Give ``completion`` its outcome and wake whoever awaits it."""
        self.post(lambda: completion.settle(outcome))

    def watch(self, descriptor: int, on_readable: Callable[[], None]) -> None:
        """Call ``on_readable`` on the engine's thread whenever there is something to read."""
        self._watched[descriptor] = on_readable
        self._poll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        """Before the descriptor is closed."""
        if self._watched.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def receive(self, timeout: float | None) -> bool:
        """Take what has come, waiting up to ``timeout`` seconds (None: for ever, 0: not at all); False if nothing."""
        if not self._events:
            return self._wait(timeout)
        event = self._events.popleft()
        if callable(event):
            event()
        else:
            self._handle(event)
        return True

    def _wait(self, timeout: float | None) -> bool:
        self._asleep = True
        try:
            # Whoever posts after this look finds us asleep, and wakes us.
            ready = self._poll.poll(0 if self._events else timeout)
        finally:
            self._asleep = False
        for descriptor, _ in ready:
            on_readable = self._watched.get(descriptor)
            if on_readable is not None:
                on_readable()
            elif descriptor == self._wake:
                os.eventfd_read(self._wake)
        return bool(ready or self._events)

    def drive(self, coroutine: Coroutine[Awaited, None, T]) -> T:
        """Run ``coroutine`` to its end, taking events whenever it awaits."""
        return self.drive_all([coroutine])[0]

    def drive_all(self, coroutines: Sequence[Coroutine[Awaited, None, T]]) -> list[T]:
        """Run ``coroutines`` to their ends, side by side: each goes on as soon as what it awaits is there.

        Events are taken whenever all of them wait. Raises what the first of them raises; the others are closed.
        """
        results: dict[int, T] = {}
        waiting: dict[int, Awaited | None] = dict.fromkeys(range(len(coroutines)))
        try:
            while waiting:
                ready = [place for place, what in waiting.items() if what is None or what.outcome is not None]
                for place in ready:
                    try:
                        waiting[place] = coroutines[place].send(None)
                    except StopIteration as stop:
                        results[place] = stop.value
                        del waiting[place]
                self._await(waiting.values())
        finally:
            for place in waiting:
                coroutines[place].close()
        return [results[place] for place in range(len(coroutines))]

    def _await(self, waiting: Collection[Awaited | None]) -> None:
        """Return once one of them has its outcome."""
        while waiting and all(each is not None and each.outcome is None for each in waiting):
            soonest = min((each for each in waiting if each is not None), key=lambda each: each.deadline)
            if not self.receive(max(0.0, soonest.deadline - time.monotonic())):
                soonest.expire()
