"""Workers that are left alone because they kept failing, and copies of frames that show whether they are well again.

Nobody waits for the answer to such a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from consilium.errors import WireError
from consilium.frames import Frame
from gateway.ejection import Ejections
from gateway.mailbox import Completion
from gateway.worker import Reply, Worker


class Probation:
    """Used by the engine's thread alone."""

    def __init__(self, ejections: Ejections, on_back: Callable[[str], None]) -> None:
        """``on_back`` is told the address of a worker that is well again."""
        self.ejections, self._on_back = ejections, on_back
        self._probes: dict[Completion[Reply], None] = {}

    @property
    def probes(self) -> int:
        """That have no outcome yet."""
        return len(self._probes)

    def due(self) -> list[str]:
        """Who is to be tried now."""
        return [each for each in self.ejections.out if self.ejections.wants_probe(each)]

    def probe(self, worker: Worker, frame: Frame, rows: Callable[[Reply], object]) -> None:
        """See whether it answers ``frame``; ``rows`` raises WireError where that is no answer."""
        self.ejections.probing(worker.address)
        call = worker.send(frame, time.monotonic() + worker.time_limit(len(frame.indices)))
        self._probes[call] = None
        call.hand_over(partial(self._probed, worker.address, call, rows))

    def expire(self, now: float) -> None:
        """End what was not answered in time (monotonic clock)."""
        for call in [each for each in self._probes if each.deadline <= now]:
            if call in self._probes:
                call.expire()

    def _probed(
        self, address: str, call: Completion[Reply], rows: Callable[[Reply], object], outcome: Reply | Exception
    ) -> None:
        del self._probes[call]
        if self.ejections.probed(address, good=_is_answer(outcome, rows)):
            self._on_back(address)


def _is_answer(outcome: Reply | Exception, rows: Callable[[Reply], object]) -> bool:
    if isinstance(outcome, Exception):
        return False
    try:
        rows(outcome)
    except WireError:
        return False
    finally:
        outcome.release()
    return True
