"""One layer of one step on its way to the workers: every frame that is sent for it, until each row is there or lost.

A frame whose worker fails is planned again over other holders. One that is late is asked for elsewhere, too, and the
first answer counts. A few are computed twice to be compared.

Letters: T tokens of the step, D hidden size, M experts asked for, P pairs of one frame.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable, InvalidRequest, WireError
from consilium.frames import Frame
from consilium.kernels.float_tile import BFLOAT16, FLOAT32
from consilium.kernels.routing import all_finite, select
from gateway.audit import PATIENCE, Audit
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.crew import Attempt, Crew
from gateway.mailbox import Completion, FirstOf
from gateway.pieces import PIECE_BYTES, in_turn, split
from gateway.placement import Plan
from gateway.stage_clock import StageClock
from gateway.work import Kind, Waits
from gateway.worker import Reply, Worker

log = logging.getLogger(__name__)

PAUSE = 0.1  # seconds until those are asked again that failed and that nobody can stand in for


class LayerCall:
    """Use it once: :meth:`run`."""

    def __init__(
        self,
        crew: Crew,
        layer: int,
        batches: ExpertBatches,
        outputs: ExpertOutputs,
        clock: StageClock,
    ) -> None:
        self.failures: dict[int, Exception] = {}  # why rows (by index) have no outputs
        self.waits = Waits()
        self._crew, self._layer, self._batches, self._outputs, self._clock = crew, layer, batches, outputs, clock
        self._form = FLOAT32 if outputs.dtype is torch.float32 else BFLOAT16
        self._choice = crew.placement.of_layer(layer).replicated
        self._deadline = time.monotonic() + crew.config.layer_timeout
        self._open: list[Attempt] = []
        self._again: list[int] = []  # positions (in batches.experts) that failed, and may be had elsewhere
        self._stranded: list[int] = []  # those that wait for somebody to come
        self._errors: dict[str, ConsiliumError] = {}  # of each worker the newest
        self._excluded: dict[str, ConsiliumError] = {}  # those that are not asked again
        self._answered: set[int] | None = None  # positions, from when some are asked for twice

    async def run(self) -> None:
        """Return when every row is there, or lost."""
        try:
            if len(self._batches.experts):
                self._ask(None, Kind.FIRST)
                self._probe()
            self._clock.mark("encode")
            while self._open or self._again or self._stranded:
                await self._wait()
                self._clock.mark("decode")
                if self._again:
                    self._retry()
                    self._clock.mark("encode")
        finally:  # also when the whole step is given up
            for attempt in self._open:
                self._crew.leave(attempt)

    async def _wait(self) -> None:
        """Until something has come, or somebody else is to be asked; what has come is taken in."""
        if not self._choice and not self._stranded:  # one after the other: nothing can be done about any of them
            first = self._open[0]
            with suppress(ConsiliumError):
                await first.call
            self.waits.seconds += self._clock.mark("wire")
            self._open.remove(first)
            self._take(first)
            return
        calls: list[Completion[Any]] = [each.call for each in self._open]
        wake = min([each.act_at for each in self._open], default=inf)
        if self._stranded:
            calls.append(self._crew.changed)
            wake = min(wake, self._deadline, time.monotonic() + PAUSE)
        await FirstOf(calls, wake)
        self.waits.seconds += self._clock.mark("wire")
        if self._stranded:
            self._again, self._stranded = self._again + self._stranded, []
            self._excluded.clear()
        while (attempt := next((each for each in self._open if each.call.outcome is not None), None)) is not None:
            self._open.remove(attempt)
            self._take(attempt)  # may end others, too
        self._drop_losers()
        self._act()

    # -- sending -------------------------------------------------------------------------------------------------

    def _ask(self, wanted: Sequence[int] | None, kind: Kind) -> None:
        """Send frames for these positions; None is all."""
        plan, orphans = self._crew.plan(self._layer, self._batches, wanted, self._excluded)
        if orphans:
            self._orphaned(orphans)
        self._send(plan, kind)

    def _send(self, plan: Plan, kind: Kind) -> None:
        sent = Counter[str]()  # pairs
        for address, positions in self._pieces(plan):
            frame, pairs = build_frame(self._layer, self._batches, positions)
            sent[address] += len(pairs)
            to = self._crew.workers[address], positions, pairs, sent[address]
            attempt = self._crew.send(kind, frame, to, self._deadline, choice=self._choice)
            self._open.append(attempt)
            if self._choice and kind is Kind.FIRST and self._crew.audits():
                self._audit(attempt, frame)

    def _pieces(self, plan: Plan) -> Iterable[tuple[str, NDArray[np.int64]]]:
        """Addresses with the positions of one frame each; nothing travels over local links, so theirs stay whole."""
        batches, workers = self._batches, self._crew.workers
        most = max(1, PIECE_BYTES // (self._outputs.hidden_size * self._outputs.dtype.itemsize))
        if len(batches.slots) <= most:
            return plan.items()
        counts = batches.counts
        return in_turn(
            {
                address: [positions] if workers[address].local_link else split(positions, counts, most)
                for address, positions in plan.items()
            }
        )

    def _retry(self) -> None:
        """Ask for what failed again, as far as the budget allows; a layer without any frame may always go on."""
        if self._open and not self._crew.retries.admits():
            return
        again, self._again = sorted(set(self._again)), []
        if time.monotonic() < self._deadline:
            self._ask(again, Kind.RETRY)
        else:
            self._fail(again, lambda expert: unavailable(self._layer, expert, self._errors))

    def _probe(self) -> None:
        """Send a copy of an expert's rows to those on probation; nobody waits for the answer."""
        for worker in self._crew.on_probation():
            experts = self._batches.experts.tolist()
            held = [place for place, each in enumerate(experts) if self._crew.holds(worker, self._layer, each)]
            if held:
                frame, pairs = build_frame(self._layer, self._batches, np.array(held[:1], np.int64))
                self._crew.probe(worker, frame, partial(self._rows, pairs=len(pairs)))

    # -- answers -------------------------------------------------------------------------------------------------

    def _take(self, attempt: Attempt) -> None:
        """What has come of it."""
        outcome = attempt.call.outcome
        self._crew.ended(attempt)
        if isinstance(outcome, ConsiliumError):
            self._failed(attempt, outcome)
            return
        if not isinstance(outcome, Reply):
            raise outcome if isinstance(outcome, Exception) else AssertionError("an attempt without an outcome ended")
        try:
            rows = self._rows(outcome, len(attempt.pairs))
        except WireError as error:
            outcome.release()
            self._failed(attempt, error)
            return
        self._crew.answered(attempt, outcome)
        self.waits.add(outcome)
        if attempt.audit is None and self._choice and not self._finite(rows):
            # The model's weights are damaged, or the worker is: another one says which.
            self._audit(attempt, attempt.frame)
        if attempt.audit is None:
            self._place(attempt, rows, outcome.release)
            return
        attempt.audit.add(attempt.worker, rows, outcome.release)
        if not attempt.audit.waiting:
            self._judge(attempt, attempt.audit)

    def _finite(self, rows: Tensor) -> bool:
        rows = rows.contiguous()
        return bool(all_finite(self._form, rows.data_ptr(), rows.numel()))

    def _rows(self, reply: Reply, pairs: int) -> Tensor:
        """The rows [P, D] of a reply. Raises WireError when they are not what was asked for."""
        return reply.rows(pairs, self._outputs.hidden_size, self._outputs.dtype)

    def _place(self, attempt: Attempt, rows: Tensor, release: Callable[[], None]) -> None:
        self._outputs.place(rows, self._batches.slots[attempt.pairs], release)
        self._crew.work_of(attempt.worker).expert_calls.append(self._batches.counts[attempt.positions])
        if self._answered is not None:
            self._answered.update(attempt.positions.tolist())

    def _failed(self, attempt: Attempt, error: ConsiliumError) -> None:
        """Have its positions elsewhere, if that can help."""
        self._crew.failed(attempt, error)
        if isinstance(error, InvalidRequest):  # of this gateway, not of its client
            error = ConsiliumError(f"a worker refused a frame of this gateway: {error.message}")
        if error.retryable:
            self._excluded[attempt.worker.address] = self._errors[attempt.worker.address] = error
        if attempt.audit is not None and self._judged_without(attempt, attempt.audit):
            return
        left = self._uncovered(attempt)
        if error.retryable:
            self._again += left
        else:
            self._fail(left, lambda _: error)

    def _uncovered(self, attempt: Attempt) -> list[int]:
        """Its positions that nobody has answered, or is still asked for."""
        covered = set(self._answered or ())
        for other in self._open:
            covered.update(other.positions.tolist())
        return [position for position in attempt.positions.tolist() if position not in covered]

    def _fail(self, positions: Sequence[int], error_of: Callable[[int], Exception]) -> None:
        """The rows that need these have no outputs; ``error_of`` says why, for an expert."""
        batches = self._batches
        for position in positions:
            error = error_of(int(batches.experts[position]))
            pairs = slice(batches.offsets[position], batches.offsets[position + 1])
            self._outputs.drop(batches.slots[pairs])
            for row in batches.tokens[pairs]:
                self.failures.setdefault(int(row), error)

    def _orphaned(self, positions: list[int]) -> None:
        """Nobody can take these: what happens is the deployment's choice."""

        batches, policy = self._batches, self._crew.config.last_replica
        if policy == "wait":
            self._stranded += positions
        elif policy == "local":
            positions = self._compute(positions)
        elif policy == "renormalise":
            for position in positions:
                self._outputs.leave_out(batches.slots[batches.offsets[position] : batches.offsets[position + 1]])
        else:
            self._fail(positions, lambda expert: unavailable(self._layer, expert, self._errors))
            return
        for position in positions:
            rows = batches.tokens[batches.offsets[position] : batches.offsets[position + 1]]
            self._outputs.stood_in.update(rows.tolist())

    def _compute(self, positions: list[int]) -> list[int]:
        """Compute these here, from the checkpoint; those that could be had."""
        frame, pairs = build_frame(self._layer, self._batches, np.array(positions, np.int64))
        try:
            rows = self._crew.local().rows(frame)
        except ConsiliumError as error:
            log.error("experts %s of layer %d cannot be computed here: %s", frame.experts, self._layer, error.message)
            self._fail(positions, lambda expert: unavailable(self._layer, expert, self._errors))
            return []
        self._outputs.place(rows, self._batches.slots[pairs])
        return positions

    # -- asking twice --------------------------------------------------------------------------------------------

    def _act(self) -> None:
        """Ask somebody else for what is late."""
        now = time.monotonic()
        while (attempt := next((each for each in self._open if each.act_at <= now), None)) is not None:
            if attempt.audit is None:
                self._hedge(attempt, now)
            else:
                self._compare_no_longer(attempt, attempt.audit)

    def _hedge(self, attempt: Attempt, now: float) -> None:
        hung, attempt.act_at = now >= attempt.hung_at, inf
        excluded = {*self._excluded, attempt.worker.address}
        plan, orphans = self._crew.plan(self._layer, self._batches, attempt.positions.tolist(), excluded)
        if orphans:
            return
        if not hung and not self._crew.hedges.spend():
            attempt.act_at = attempt.hung_at
            return
        self._answered = set() if self._answered is None else self._answered
        self._send(plan, Kind.HEDGE)

    def _drop_losers(self) -> None:
        """Wait no longer for what others have answered."""
        if self._answered:
            covered = [each for each in self._open if self._answered.issuperset(each.positions.tolist())]
            lost = [each for each in covered if each.audit is None]  # others are judged
            for attempt in lost:
                self._open.remove(attempt)
                self._crew.abandon(attempt)

    # -- audits --------------------------------------------------------------------------------------------------

    def _audit(self, attempt: Attempt, frame: Frame) -> None:
        """Have a second worker compute the same, where there is one."""
        audit = Audit(frame, waiting=1)
        if self._ask_another(attempt, audit):
            attempt.audit, attempt.act_at = audit, time.monotonic() + PATIENCE

    def _ask_another(self, attempt: Attempt, audit: Audit) -> bool:
        """Whether somebody else computes the frame of ``attempt``, too."""
        asked = audit.asked | {attempt.worker.address}
        worker = self._crew.second(audit.frame, asked)
        if worker is None:
            return False
        to = worker, attempt.positions, attempt.pairs, attempt.rows
        other = self._crew.send(Kind.AUDIT, audit.frame, to, self._deadline, choice=True)
        audit.asked = asked | {worker.address}
        audit.waiting += 1
        other.audit, other.act_at = audit, time.monotonic() + PATIENCE
        self._open.append(other)
        return True

    def _compare_no_longer(self, attempt: Attempt, audit: Audit) -> None:
        """Waiting for the second answer ends; without a first one it goes on."""
        attempt.act_at += PATIENCE
        if audit.answers:
            self._open.remove(attempt)
            self._crew.abandon(attempt)
            audit.waiting -= 1
            self._judge(attempt, audit)

    def _judge(self, attempt: Attempt, audit: Audit) -> None:
        """All answers are here. Where they differ the checkpoint says who is right, or one more worker."""
        rows, liars = audit.verdict()
        if rows is None:
            rows, liars = audit.verdict(self._truth(audit))
        if rows is None and self._ask_another(attempt, audit):
            return
        for worker in liars:
            self._crew.condemn(worker, audit.frame, audit.asked - {worker.address})
            self._excluded[worker.address] = WireError("answered with wrong numbers")
            self._disbelieve(worker)
        if rows is None:
            audit.release()
            log.error("workers %s differ, and nobody can say who is right", ", ".join(sorted(audit.asked)))
            self._fail(attempt.positions.tolist(), lambda _: ExpertUnavailable("its workers answer differently"))
        else:
            self._place(attempt, rows, audit.release)

    def _disbelieve(self, worker: Worker) -> None:
        """Have what it is still asked for elsewhere."""
        while (attempt := next((each for each in self._open if each.worker is worker), None)) is not None:
            self._open.remove(attempt)
            self._crew.leave(attempt)
            if attempt.audit is None or not self._judged_without(attempt, attempt.audit):
                self._again += self._uncovered(attempt)

    def _judged_without(self, attempt: Attempt, audit: Audit) -> bool:
        """Whether the other answers of ``audit`` were all that was missing."""
        audit.waiting -= 1
        if not audit.answers or audit.waiting:
            return False
        self._judge(attempt, audit)
        return True

    def _truth(self, audit: Audit) -> Tensor | None:
        """What the checkpoint says; None where this gateway cannot compute as its workers do."""
        classes = {worker.numerics_class for worker, _ in audit.answers}
        try:
            local = self._crew.local()
            return local.rows(audit.frame) if classes == {local.numerics_class} else None
        except ConsiliumError as error:
            log.warning("cannot compute experts here: %s", error.message)
            return None


def build_frame(layer: int, batches: ExpertBatches, positions: NDArray[np.int64]) -> tuple[Frame, NDArray[np.int64]]:
    """The frame for the experts at ``positions``, each distinct token row once, and which pairs it covers [P]."""
    pairs, tokens, offsets, indices = select(batches.offsets, batches.tokens, positions, len(batches.rows))
    rows, scales = batches.rows, batches.scales
    if len(tokens) < len(rows):
        chosen = torch.from_numpy(tokens)
        rows, scales = rows[chosen], None if scales is None else scales[chosen]
    experts = batches.experts[positions].tolist()
    return Frame(layer, rows, scales, experts, offsets.tolist(), torch.from_numpy(indices), batches.prefill), pairs


def unavailable(layer: int, expert: int, excluded: Mapping[str, ConsiliumError]) -> ConsiliumError:
    """Why nobody computes this expert. Clients get no addresses; they are in the log, and on /load."""
    for address, error in excluded.items():
        log.warning("expert %d of layer %d: %s: %s", expert, layer, address, error.message)
    reason = "; ".join(sorted({error.message for error in excluded.values()})) or "no worker that holds it is connected"
    message = f"expert {expert} of layer {layer} is unavailable: {reason}"
    if excluded and all(isinstance(error, DeadlineExceeded) for error in excluded.values()):
        return DeadlineExceeded(message)
    return ExpertUnavailable(message)
