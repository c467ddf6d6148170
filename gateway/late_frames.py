"""What is done about frames of one layer that are late: others are asked, too, and the first answer counts."""

from __future__ import annotations

import time
from math import inf

from gateway.attempt import Attempt
from gateway.crew import Crew
from gateway.frames_in_flight import FramesInFlight
from gateway.layer_audits import LayerAudits
from gateway.layer_rows import LayerRows
from gateway.work import Kind


class LateFrames:
    """Those that are compared with others are left to ``audits``."""

    __slots__ = ("_audits", "_crew", "_frames", "_rows")

    def __init__(self, crew: Crew, frames: FramesInFlight, rows: LayerRows, audits: LayerAudits) -> None:
        self._crew, self._frames, self._rows, self._audits = crew, frames, rows, audits

    def act(self) -> None:
        """Ask somebody else for what is late by now."""
        now = time.monotonic()
        for attempt in [each for each in self._frames.open if each.act_at <= now]:
            if attempt.audit is None:
                self._hedge(attempt, now)
            else:
                self._audits.overdue(attempt, attempt.audit)

    def drop_losers(self) -> None:
        """Wait no longer for what others have answered; frames that are compared are judged."""
        placed = self._rows.placed
        if not placed:
            return
        for attempt in [each for each in self._frames.open if placed.issuperset(each.positions.tolist())]:
            if attempt.audit is None:
                del self._frames.open[attempt]
                self._crew.abandon(attempt)

    def _hedge(self, attempt: Attempt, now: float) -> None:
        hung, attempt.act_at = now >= attempt.hung_at, inf
        plan, orphans = self._frames.plan(attempt.positions.tolist(), [attempt.worker.address])
        if orphans:
            return
        if not hung and not self._crew.hedges.spend():
            attempt.act_at = attempt.hung_at
            return
        if self._rows.placed is None:
            self._rows.placed = set()
        self._frames.send(plan, Kind.HEDGE)
