"""When to stop asking something that does not answer, and when to try again. Pure but for the clock.

Failures within a window count, not failures in a row: something that is slow every second time never fails often in
a row, and would cost its timeout for ever.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from gateway.messages import BreakerState

FAILURES = 5  # that many within the window open it
WINDOW = 10.0  # seconds
FIRST_PAUSE, LAST_PAUSE = 1.0, 30.0  # seconds that it stays open; doubled while it does not stay closed for a window


class Breaker:
    """Closed: ask. Open: do not. Half open: the pause is over and one attempt decides."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state: BreakerState = "closed"
        self.pause = FIRST_PAUSE
        self._clock = clock
        self._failures: deque[float] = deque(maxlen=FAILURES)  # when they happened
        self._ends = 0.0  # when the pause does
        self._closed_at = -WINDOW

    def permit(self) -> bool:
        """Whether to ask now. In the half-open state only once, until that attempt's outcome is told."""
        if self.state == "open" and self._clock() >= self._ends:
            self.state = "half_open"
            return True
        return self.state == "closed"

    def succeeded(self) -> None:
        """There was an answer in time."""
        if self.state != "closed":
            self.state, self._closed_at = "closed", self._clock()
            self._failures.clear()

    def failed(self) -> None:
        """There was none."""
        now = self._clock()
        self._failures.append(now)
        many = len(self._failures) == FAILURES and now - self._failures[0] <= WINDOW
        if self.state == "half_open" or (self.state == "closed" and many):
            recovered = self.state == "closed" and now - self._closed_at >= WINDOW
            self.pause = FIRST_PAUSE if recovered else min(self.pause * 2, LAST_PAUSE)
            self.state, self._ends = "open", now + self.pause
