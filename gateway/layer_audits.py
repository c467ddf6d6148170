"""The frames of one layer that several workers compute, to be compared; and what follows where they differ.

Letters: P pairs of one frame, D hidden size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from torch import Tensor

from consilium.errors import ConsiliumError, ExpertUnavailable, WireError
from gateway.attempt import Attempt
from gateway.audit import PATIENCE, Audit
from gateway.crew import Crew
from gateway.frames_in_flight import FramesInFlight
from gateway.layer_rows import LayerRows
from gateway.work import Kind
from gateway.worker import Worker

log = logging.getLogger(__name__)


class LayerAudits:
    """A frame of an audit is placed, or failed, when everybody has answered who was asked for it."""

    __slots__ = ("_crew", "_frames", "_rows", "_unjudged")

    def __init__(self, crew: Crew, frames: FramesInFlight, rows: LayerRows) -> None:
        self._crew, self._frames, self._rows = crew, frames, rows
        self._unjudged: dict[Audit, None] = {}

    def begin(self, attempt: Attempt) -> None:
        """Have a second worker compute the same, where there is one."""
        audit = Audit(attempt.frame, {attempt.worker.address: attempt.process})
        if self._ask_another(attempt, audit):
            attempt.audit, attempt.act_at = audit, time.monotonic() + PATIENCE
            self._unjudged[audit] = None

    def answered(self, attempt: Attempt, audit: Audit, rows: Tensor, release: Callable[[], None]) -> None:
        """These are the rows [P, D] that came."""
        audit.add(attempt.worker, rows, release)
        if not audit.waiting:
            self._judge(attempt, audit)

    def unanswered(self, attempt: Attempt, audit: Audit) -> bool:
        """There will be no rows of this attempt. Whether there are answers of others, so that it is not missed."""
        audit.waiting -= 1
        if audit.answers and not audit.waiting:
            self._judge(attempt, audit)
        return bool(audit.answers or audit.waiting)

    def overdue(self, attempt: Attempt, audit: Audit) -> None:
        """It has had its time, or has lied. Waiting ends where there are other answers, or will be."""
        attempt.act_at = time.monotonic() + PATIENCE
        if audit.answers or (audit.waiting > 1 and self._crew.lied(attempt.worker)):
            del self._frames.open[attempt]
            self._crew.abandon(attempt)
            self.unanswered(attempt, audit)

    def leave(self) -> None:
        """Nobody waits for what is not judged yet."""
        for audit in self._unjudged:
            audit.release()

    def _ask_another(self, attempt: Attempt, audit: Audit) -> bool:
        """Whether somebody else computes the frame of ``attempt``, too."""
        worker = self._crew.second(audit.frame, audit.asked, audit.numerics_class)
        if worker is None:
            return False
        other = self._frames.send_again(attempt, worker, Kind.AUDIT)
        other.audit, other.act_at = audit, time.monotonic() + PATIENCE
        audit.asked[worker.address] = other.process
        audit.waiting += 1
        return True

    def _judge(self, attempt: Attempt, audit: Audit) -> None:
        """All answers are here. Where they differ the checkpoint says who is right, or one more worker."""
        rows, liars = audit.verdict()
        if rows is None or audit.unsupported:
            truth = self._truth(audit)
            if truth is not None:
                rows, liars = audit.verdict(truth)
            elif self._ask_another(attempt, audit):
                return
        del self._unjudged[audit]
        for worker in liars:
            self._condemn(worker, audit)
        if rows is not None:
            self._rows.place(attempt, rows, audit.release)
            return
        audit.release()
        log.error("workers %s differ, and nobody can say who is right", ", ".join(sorted(audit.asked)))
        self._rows.fail(attempt.positions.tolist(), lambda _: ExpertUnavailable("its workers answer differently"))

    def _condemn(self, worker: Worker, audit: Audit) -> None:
        """Nothing that it says is believed any more, so what it is still asked for is had elsewhere at once."""
        address = worker.address
        self._crew.condemn(worker, audit.asked[address].identity, audit.frame, audit.asked.keys() - {address})
        self._frames.excluded[address] = WireError("answered with wrong numbers")
        for attempt in self._frames.open:
            if attempt.worker.address == address:
                attempt.act_at = attempt.hung_at = 0.0

    def _truth(self, audit: Audit) -> Tensor | None:
        """What the checkpoint says; None where this gateway cannot compute as its workers do."""
        try:
            local = self._crew.local()
            return local.rows(audit.frame) if local.numerics_class == audit.numerics_class else None
        except ConsiliumError as error:
            log.warning("cannot compute experts here: %s", error.message)
            return None
