"""Frames that nobody waits for any more: of those who lost, who lied, and whose step was given up.

Each is kept until it has its outcome, for until then its worker may still write into its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gateway.attempt import Attempt
from gateway.worker import Reply

Came = Callable[[Attempt, Reply | Exception], None]


class Unattended:
    """Used by the engine's thread alone."""

    def __init__(self, came: Came) -> None:
        """``came`` is told of each outcome, once."""
        self._came = came
        self._attempts: dict[Attempt, None] = {}

    @property
    def attempts(self) -> int:
        """That have no outcome yet."""
        return len(self._attempts)

    @property
    def addresses(self) -> set[str]:
        """Whose answers are still missing."""
        return {each.worker.address for each in self._attempts}

    def add(self, attempt: Attempt) -> None:
        """Its worker is told, and need not compute it."""
        self._attempts[attempt] = None
        attempt.call.withdraw()
        attempt.call.hand_over(partial(self._settled, attempt))

    def expire(self, now: float) -> None:
        """End what was not answered in time (monotonic clock)."""
        for attempt in [each for each in self._attempts if each.call.deadline <= now]:
            if attempt in self._attempts:  # one that expires may take others with it
                attempt.call.expire()

    def _settled(self, attempt: Attempt, outcome: Reply | Exception) -> None:
        del self._attempts[attempt]
        self._came(attempt, outcome)
