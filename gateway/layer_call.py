"""One layer of one step on its way to the workers: every frame that is sent for it, until each row is there or lost.

A frame whose worker fails is planned again over other holders. One that is late is asked for elsewhere, too, and the
first answer counts. A few are computed twice to be compared.

Letters: T tokens of the step, D hidden size, M experts asked for, P pairs of one frame.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import numpy as np

from consilium.errors import ConsiliumError, InvalidRequest, WireError
from gateway.attempt import Attempt
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.crew import Crew
from gateway.frames_in_flight import FramesInFlight
from gateway.framing import build_frame
from gateway.late_frames import LateFrames
from gateway.layer_audits import LayerAudits
from gateway.layer_rows import LayerRows
from gateway.mailbox import Completion, FirstOf
from gateway.stage_clock import StageClock
from gateway.work import Kind, Waits
from gateway.worker import Reply

PAUSE = 0.1  # seconds until those are asked again that failed and that nobody can stand in for


class LayerCall:
    """Use it once: :meth:`run`. Positions are those in ``batches.experts``."""

    def __init__(
        self,
        crew: Crew,
        layer: int,
        batches: ExpertBatches,
        outputs: ExpertOutputs,
        clock: StageClock,
    ) -> None:
        self.waits = Waits()
        self.rows = LayerRows(crew, layer, batches, outputs)
        self._crew, self._layer, self._batches, self._clock = crew, layer, batches, clock
        self._frames = FramesInFlight(crew, layer, batches, outputs.hidden_size * outputs.dtype.itemsize)
        self._audits = LayerAudits(crew, self._frames, self.rows)
        self._late = LateFrames(crew, self._frames, self.rows, self._audits)
        self._again: list[int] = []  # positions that failed, and may be had elsewhere
        self._stranded: list[int] = []  # those that wait for somebody to come
        self._errors: dict[str, ConsiliumError] = {}  # of each worker the newest

    async def run(self) -> None:
        """Return when every row is there, or lost."""
        try:
            if len(self._batches.experts):
                self._ask(None, Kind.FIRST)
                self._probe()
            self._clock.mark("encode")
            while self._frames.open or self._again or self._stranded:
                await self._wait()
                self._clock.mark("decode")
                if self._again:
                    self._retry()
                    self._clock.mark("encode")
            self.rows.account()
        finally:  # also when the whole step is given up
            self._frames.leave()
            self._audits.leave()

    # -- sending -------------------------------------------------------------------------------------------------

    def _ask(self, wanted: Sequence[int] | None, kind: Kind) -> None:
        """Send frames for these positions; None is all."""
        plan, orphans = self._frames.plan(wanted)
        if orphans:
            self._stranded += self.rows.orphaned(orphans, self._errors)
        for attempt in self._frames.send(plan, kind):
            if self._frames.choice and self._crew.audits():
                self._audits.begin(attempt)

    def _retry(self) -> None:
        """Ask for what failed again, as far as the budget allows; a layer without any frame may always go on."""
        if self._frames.open and not self._crew.retries.admits():
            return
        again, self._again = sorted(set(self._again)), []
        if time.monotonic() < self._frames.deadline:
            self._ask(again, Kind.RETRY)
        else:
            self.rows.unavailable(again, self._errors)

    def _probe(self) -> None:
        """Send a copy of an expert's rows to those on probation; nobody waits for the answer."""
        for worker in self._crew.on_probation():
            experts = self._batches.experts.tolist()
            held = [place for place, each in enumerate(experts) if self._crew.holds(worker, self._layer, each)]
            if held:
                frame, pairs = build_frame(self._layer, self._batches, np.array(held[:1], np.int64))
                self._crew.probation.probe(worker, frame, partial(self.rows.of, pairs=len(pairs)))

    # -- answers -------------------------------------------------------------------------------------------------

    async def _wait(self) -> None:
        """Until something has come, or somebody else is to be asked; what has come is taken in."""
        if self._frames.choice or self._stranded:
            await self._first()
        else:  # one after the other: nothing can be done about any of them
            with suppress(ConsiliumError):
                await next(iter(self._frames.open)).call
            self.waits.seconds += self._clock.mark("wire")
        for attempt in [each for each in self._frames.open if each.call.outcome is not None]:
            self._take(attempt)
        if self._frames.choice:
            self._late.drop_losers()
            self._late.act()

    async def _first(self) -> None:
        """Until one of them is there, or late; or, where positions are stranded, until they are to be tried again."""
        calls: list[Completion[Any]] = [each.call for each in self._frames.open]
        wake = min([each.act_at for each in self._frames.open], default=inf)
        if self._stranded:
            calls.append(self._crew.changed)
            wake = min(wake, self._frames.deadline, time.monotonic() + PAUSE)
        await FirstOf(calls, wake)
        self.waits.seconds += self._clock.mark("wire")
        if self._stranded:
            self._again, self._stranded = self._again + self._stranded, []
            self._frames.excluded.clear()

    def _take(self, attempt: Attempt) -> None:
        """What has come of it."""
        del self._frames.open[attempt]
        self._crew.ended(attempt)
        outcome = attempt.call.outcome
        if isinstance(outcome, Reply):
            self._answered(attempt, outcome)
        elif isinstance(outcome, ConsiliumError):
            self._failed(attempt, outcome)
        else:
            raise outcome if isinstance(outcome, Exception) else AssertionError("an attempt without an outcome ended")

    def _answered(self, attempt: Attempt, reply: Reply) -> None:
        try:
            if self._crew.lied(attempt.worker):
                raise WireError("answered with wrong numbers before")
            rows = self.rows.of(reply, len(attempt.pairs))
        except WireError as error:
            reply.release()
            self._failed(attempt, error)
            return
        self._crew.answered(attempt, reply)
        self.waits.add(reply)
        if attempt.audit is None and self._frames.choice and not self.rows.finite(rows):
            self._audits.begin(attempt)  # the model's weights are damaged, or the worker is: another one says which
        if attempt.audit is None:
            self.rows.place(attempt, rows, reply.release)
        else:
            self._audits.answered(attempt, attempt.audit, rows, reply.release)

    def _failed(self, attempt: Attempt, error: ConsiliumError) -> None:
        """Have its positions elsewhere, if that can help."""
        self._crew.failed(attempt, error)
        if isinstance(error, InvalidRequest):  # of this gateway, not of its client
            error = ConsiliumError(f"a worker refused a frame of this gateway: {error.message}")
        if error.retryable:
            self._frames.excluded[attempt.worker.address] = self._errors[attempt.worker.address] = error
        if attempt.audit is not None and self._audits.unanswered(attempt, attempt.audit):
            return
        covered = self._frames.asked_for() | (self.rows.placed or set())
        left = [position for position in attempt.positions.tolist() if position not in covered]
        if error.retryable:
            self._again += left
        else:
            self.rows.fail(left, lambda _: error)
