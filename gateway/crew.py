"""The workers that frames are sent to: who holds what, who did how much, who is late, who fails, and who lied.

Used by the engine's thread alone.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from math import inf

import numpy as np

from consilium.config import GatewayConfig
from consilium.errors import Cancelled, ConsiliumError, Overloaded, StalePlacement
from consilium.frames import Frame
from gateway.attempt import Attempt
from gateway.batches import ExpertBatches
from gateway.ejection import Ejections
from gateway.fleet import NOBODY, Fleet, frame_size
from gateway.hedging import AnswerTimes, HedgeBudget, RetryBudget
from gateway.local_experts import LocalExperts
from gateway.mailbox import Completion
from gateway.placement import Placement, Plan, assign, assign_owned
from gateway.probation import Probation
from gateway.unattended import Unattended
from gateway.work import Kind, WorkBook
from gateway.worker import NOT_KNOWN, Reply, Worker, WorkerProcess

log = logging.getLogger(__name__)

UNKNOWN = 0.1  # of its time limit: when a frame is late whose worker has not answered enough of that size
HUNG = 10  # times that limit: asked elsewhere whatever the budget


class Crew:
    """Everything that outlives a layer."""

    def __init__(self, config: GatewayConfig, local: Callable[[], LocalExperts]) -> None:
        """``local`` makes what computes experts here, for audits and last replicas. It raises ConsiliumError."""
        self.config = config
        self.local: Callable[[], LocalExperts] = cache(local)
        self.placement = Placement()
        self.workers: Mapping[str, Worker] = {}
        self.fleet, self.work = Fleet(), WorkBook()
        self.hedges, self.retries = HedgeBudget(config.hedging), RetryBudget()
        self.probation = Probation(Ejections(config.ejection_time), self._back)
        self.unattended = Unattended(self._came_late)
        self.changed: Completion[bool] = Completion(inf, lambda: None)  # settled when there is another placement
        self.on_change: Callable[[], None] = lambda: None  # told when who is sent frames changes
        self.on_liar: Callable[[], None] = lambda: None  # told when numbers have been found to be wrong
        self._told = self.placement  # with those who lied
        self._stated = NOBODY
        self._processes: dict[str, WorkerProcess] = {}  # by address
        self.liars: dict[str, str] = {}  # identities by address, of those whose word is worth nothing
        self._times = AnswerTimes()
        self._chance = random.Random()  # noqa: S311 (no secret)
        self._turn = 0

    # -- who there is --------------------------------------------------------------------------------------------

    def follow(self, placement: Placement, workers: Mapping[str, Worker], stated: Mapping[str, float] = NOBODY) -> None:
        """Send frames to these from now on. Who was started anew is judged anew; ``stated`` as Fleet.arrange has it."""
        for address, worker in workers.items():
            now = WorkerProcess(worker.identity, worker.numerics_class)
            if not now.identity:  # it has just been lost again
                continue
            before, self._processes[address] = self.process(address), now
            if before.identity != now.identity:
                self.liars.pop(address, None)
                self._times.forget(address)
                self.probation.ejections.forget(address)
        self._told, self.workers, self._stated = placement, workers, stated
        self._arrange()

    def process(self, address: str) -> WorkerProcess:
        """That was last seen there."""
        return self._processes.get(address, NOT_KNOWN)

    def out(self) -> dict[str, str]:
        """Who gets no frames although it is connected, and why."""
        ejected = dict.fromkeys(
            self.probation.ejections.out, "ejected: it kept failing; it is tried again after a while"
        )
        liars = dict.fromkeys(self.liars, "ejected: it answered with wrong numbers; start it again, or replace it")
        return {address: why for address, why in {**ejected, **liars}.items() if address in self.workers}

    def lied(self, worker: Worker) -> bool:
        """Whether nothing that it says is believed any more."""
        return worker.address in self.liars

    def condemn(self, worker: Worker, identity: str, frame: Frame, others: Collection[str]) -> None:
        """The numbers of this process are wrong: it gets nothing until it has been started anew."""
        log.error(
            "worker %s gets no more frames: its rows of layer %d, experts %s are not those of %s",
            worker.address,
            frame.layer,
            frame.experts,
            ", ".join(others) or "the checkpoint",
        )
        self.work.of(worker).lies += 1
        if self.process(worker.address).identity == identity:  # also while it is not connected: it may come back
            self.liars[worker.address] = identity
            self._arrange()
        self.on_liar()
        self.on_change()

    def second(self, frame: Frame, asked: Collection[str], numerics_class: str) -> Worker | None:
        """One in good standing and of this class that holds all experts of ``frame``, but none of those ``asked``."""
        held = [set(self.placement.holders.get((frame.layer, expert), ())) for expert in frame.experts]
        found = [
            self.workers[address]
            for address in sorted(set.intersection(*held) - set(asked))
            if not self.fleet.standing[self.fleet.index[address]]
            and self.process(address).numerics_class == numerics_class
        ]
        return self._chance.choice(found) if found else None

    def holds(self, worker: Worker, layer: int, expert: int) -> bool:
        """Whether it may be asked for this expert."""
        return worker.address in self.placement.holders.get((layer, expert), ())

    def on_probation(self) -> list[Worker]:
        """Who is to be tried now."""
        return [self.workers[address] for address in self.probation.due() if address in self.workers]

    def plan(
        self, layer: int, batches: ExpertBatches, wanted: Sequence[int] | None, excluded: Collection[str]
    ) -> tuple[Plan, list[int]]:
        """Positions (in ``batches.experts``) for each address, and those without a holder; None wants all."""
        holders = self.placement.of_layer(layer)
        plan = assign_owned(holders, batches.experts) if wanted is None and not holders.replicated else None
        if plan is not None:
            return plan, []
        self._turn += 1
        if wanted is None:
            plan, orphans = assign(holders, batches.experts, batches.counts, self.fleet, self._turn, excluded)
            return plan, orphans.tolist()
        some = np.array(wanted, np.int64)
        experts, counts = batches.experts[some], batches.counts[some]
        plan, orphans = assign(holders, experts, counts, self.fleet, self._turn, excluded)
        return {address: some[positions] for address, positions in plan.items()}, some[orphans].tolist()

    # -- frames --------------------------------------------------------------------------------------------------

    def send(self, attempt: Attempt, deadline: float, *, choice: bool) -> None:
        """Send its frame to its worker, to be given up in time.

        Where there is a ``choice`` of workers, what they have to do and how long they take is kept.
        """
        worker, kind, now = attempt.worker, attempt.kind, time.monotonic()
        most = worker.time_limit(attempt.rows)
        attempt.process = self.process(worker.address)
        attempt.sent, attempt.call = now, worker.send(attempt.frame, min(deadline, now + most))
        self.retries.active += 1
        if kind is not Kind.FIRST:
            self.retries.retries += kind is Kind.RETRY
            self.work.of(worker).sent_as(kind)
        if choice:
            attempt.size = frame_size(len(attempt.positions), len(attempt.pairs))
            self.fleet.sent(worker.address, attempt.size)
            if kind in (Kind.FIRST, Kind.RETRY):
                late = self._times.of(worker.address).limit(attempt.rows) or UNKNOWN * most
                attempt.act_at, attempt.hung_at = now + late, now + HUNG * late
                self.hedges.earn()

    def audits(self) -> bool:
        """Whether the next frame is to be computed twice. By chance: a fixed order could leave out whole layers."""
        return self._chance.random() < self.config.audit

    def ended(self, attempt: Attempt) -> None:
        """It has its outcome."""
        self.retries.active -= 1
        self.retries.retries -= attempt.kind is Kind.RETRY
        if attempt.size:
            outcome = attempt.call.outcome
            compute_us = outcome.compute_us if isinstance(outcome, Reply) else 0
            self.fleet.ended(attempt.worker.address, attempt.size, compute_us)

    def answered(self, attempt: Attempt, reply: Reply) -> None:
        """Its rows are as they should be."""
        self.work.of(attempt.worker).add(reply, len(attempt.pairs))
        self.probation.ejections.answered(attempt.worker.address)
        if attempt.size:
            self._times.of(attempt.worker.address).add(attempt.rows, reply.round_trip)

    def failed(self, attempt: Attempt, error: ConsiliumError) -> None:
        """There are no rows. Who fails again and again is left alone, but for what nobody else holds."""
        worker, ejections = attempt.worker, self.probation.ejections
        self.work.of(worker).failures += 1
        if isinstance(error, Overloaded | StalePlacement):  # it does what it should
            return
        group = [each.address for each in self.workers.values() if each.group == worker.group]
        out = sum(address in group for address in ejections.out)
        if ejections.failed(worker.address, len(group), out):
            log.warning("worker %s is left alone for a while: it failed again and again: %s", worker.address, error)
            self.work.of(worker).ejections += 1
            self._stand(worker.address)
            self.on_change()

    # -- frames that nobody waits for ----------------------------------------------------------------------------

    def abandon(self, attempt: Attempt) -> None:
        """Others were faster. Until it is answered its worker is asked for nothing that others hold."""
        self.leave(attempt)
        self.work.of(attempt.worker).late += 1
        self._stand(attempt.worker.address)

    def leave(self, attempt: Attempt) -> None:
        """Nobody waits for it any more; its memory is released when it is answered."""
        self.unattended.add(attempt)

    def give_up(self) -> None:
        """End what nobody waits for and nobody has answered in time."""
        if self.unattended.attempts or self.probation.probes:
            now = time.monotonic()
            self.unattended.expire(now)
            self.probation.expire(now)

    def _came_late(self, attempt: Attempt, outcome: Reply | Exception) -> None:
        self.ended(attempt)
        times, address = self._times.of(attempt.worker.address), attempt.worker.address
        if isinstance(outcome, Reply):
            outcome.release()
            times.add(attempt.rows, outcome.round_trip)
        elif isinstance(outcome, Cancelled):  # it had not begun, or not ended, by then
            times.not_within(attempt.rows, time.monotonic() - attempt.sent)
        elif isinstance(outcome, ConsiliumError):
            self.failed(attempt, outcome)
        self._stand(address)

    # -- standing ------------------------------------------------------------------------------------------------

    def _arrange(self) -> None:
        """Without those who lied, and with whoever is in doubt as the last resort."""
        self.placement = self._told.without(self.liars) if self.liars else self._told
        self.fleet.arrange(self.placement.addresses, self._stated)
        for address in {*self.probation.ejections.out, *self.unattended.addresses}:
            self._stand(address)
        changed, self.changed = self.changed, Completion(inf, lambda: None)
        changed.settle(True)

    def _back(self, address: str) -> None:
        log.info("worker %s is back: it answers again", address)
        self._stand(address)
        self.on_change()

    def _stand(self, address: str) -> None:
        doubtful = address in self.unattended.addresses or address in self.probation.ejections.out
        self.fleet.doubt(address, doubtful=doubtful)
