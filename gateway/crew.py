"""The workers that frames are sent to: who holds what, who did how much, who is late, who fails, and who lied.

Used by the engine's thread alone.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import inf

import numpy as np
from numpy.typing import NDArray

from consilium.config import GatewayConfig
from consilium.errors import ConsiliumError, Overloaded, StalePlacement, WireError
from consilium.frames import Frame
from gateway.audit import Audit
from gateway.batches import ExpertBatches
from gateway.ejection import Ejections
from gateway.fleet import NOBODY, Fleet, frame_size
from gateway.hedging import HedgeBudget, RetryBudget, RowTimes
from gateway.local_experts import LocalExperts
from gateway.mailbox import Completion
from gateway.messages import WorkerStats
from gateway.placement import Placement, Plan, assign, assign_owned
from gateway.work import Kind, Work
from gateway.worker import Reply, Worker

log = logging.getLogger(__name__)

UNKNOWN = 0.1  # of its time limit: when a frame is late whose worker has not answered enough of that size
HUNG = 10  # times that limit: asked elsewhere whatever the budget


@dataclass(slots=True, eq=False)
class Attempt:
    """One frame on its way to one worker."""

    kind: Kind
    worker: Worker
    frame: Frame
    positions: NDArray[np.int64]  # of its experts, in ExpertBatches
    pairs: NDArray[np.int64]  # that it covers [P]
    call: Completion[Reply]
    rows: int  # with those of frames before it, which it waits for
    size: int = 0  # for the fleet; 0 where nothing can be chosen
    act_at: float = inf  # when somebody else is asked (monotonic clock)
    hung_at: float = inf
    audit: Audit | None = None


class Crew:
    """Everything that outlives a layer."""

    def __init__(self, config: GatewayConfig, local: Callable[[], LocalExperts]) -> None:
        """``local`` makes what computes experts here, for audits and last replicas. It raises ConsiliumError."""
        self.config = config
        self.local: Callable[[], LocalExperts] = cache(local)
        self.placement = Placement()
        self.workers: Mapping[str, Worker] = {}
        self.fleet = Fleet()
        self.hedges, self.retries = HedgeBudget(config.hedging), RetryBudget()
        self.ejections = Ejections(config.ejection_time)
        self.changed: Completion[bool] = Completion(inf, lambda: None)  # settled when there is another placement
        self.on_change: Callable[[], None] = lambda: None  # told when who is sent frames changes
        self.on_liar: Callable[[], None] = lambda: None  # told when numbers have been found to be wrong
        self._told = self.placement  # with those who lied
        self._stated = NOBODY
        self._liars: dict[str, str] = {}  # identities by address
        self._times: dict[str, RowTimes] = {}
        self._unattended: list[Attempt] = []  # that nobody waits for any more
        self._probes: list[Completion[Reply]] = []
        self._identities: dict[str, str] = {}
        self._work: dict[str, Work] = {}
        self._chance = random.Random()  # noqa: S311 (no secret)
        self._turn = 0

    # -- who there is --------------------------------------------------------------------------------------------

    def follow(self, placement: Placement, workers: Mapping[str, Worker], stated: Mapping[str, float] = NOBODY) -> None:
        """Send frames to these from now on. Who was started anew is judged anew; ``stated`` as Fleet.arrange has it."""
        for address, worker in workers.items():
            identity = worker.identity  # empty where it has just been lost again
            if identity and self._identities.get(address) != identity:
                self._identities[address] = identity
                self._liars.pop(address, None)
                self._times.pop(address, None)
                self.ejections.forget(address)
        self._told, self.workers, self._stated = placement, workers, stated
        self._arrange()

    def out(self) -> dict[str, str]:
        """Who gets no frames although it is connected, and why."""
        ejected = dict.fromkeys(self.ejections.out, "ejected: it kept failing; it is tried again after a while")
        liars = dict.fromkeys(self._liars, "ejected: it answered with wrong numbers; start it again, or replace it")
        return {address: why for address, why in {**ejected, **liars}.items() if address in self.workers}

    def second(self, frame: Frame, asked: Collection[str]) -> Worker | None:
        """One in good standing that holds all experts of ``frame`` and computes as whoever is ``asked``; not those."""
        held = [set(self.placement.holders.get((frame.layer, expert), ())) for expert in frame.experts]
        classes = {self.workers[each].numerics_class for each in asked if each in self.workers}
        found = [
            self.workers[address]
            for address in sorted(set.intersection(*held) - set(asked))
            if not self.fleet.standing[self.fleet.index[address]] and {self.workers[address].numerics_class} == classes
        ]
        return self._chance.choice(found) if found else None

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

    def send(
        self,
        kind: Kind,
        frame: Frame,
        to: tuple[Worker, NDArray[np.int64], NDArray[np.int64], int],
        deadline: float,
        *,
        choice: bool,
    ) -> Attempt:
        """Send ``frame`` to a worker, with the positions, pairs and rows that it stands for, to be given up in time.

        Where there is a ``choice`` of workers, what they have to do and how long they take is kept.
        """
        worker, positions, pairs, rows = to
        now, most = time.monotonic(), worker.time_limit(rows)
        sent = Attempt(kind, worker, frame, positions, pairs, worker.send(frame, min(deadline, now + most)), rows)
        self.retries.active += 1
        if kind is not Kind.FIRST:
            self.retries.retries += kind is Kind.RETRY
            self.work_of(worker).sent_as(kind)
        if choice:
            sent.size = frame_size(len(positions), len(pairs))
            self.fleet.sent(worker.address, sent.size)
            if kind in (Kind.FIRST, Kind.RETRY):
                late = self._times_of(worker).limit(rows) or UNKNOWN * most
                sent.act_at, sent.hung_at = now + late, now + HUNG * late
                self.hedges.earn()
        return sent

    def audits(self) -> bool:
        """Whether the next frame is to be computed twice. By chance: a fixed order could leave out whole layers."""
        return self._chance.random() < self.config.audit

    def ended(self, attempt: Attempt) -> None:
        """It has its outcome."""
        self.retries.active -= 1
        self.retries.retries -= attempt.kind is Kind.RETRY
        if attempt.size:
            outcome = attempt.call.outcome
            self.fleet.ended(
                attempt.worker.address, attempt.size, outcome.compute_us if isinstance(outcome, Reply) else 0
            )

    def answered(self, attempt: Attempt, reply: Reply) -> None:
        """Its rows are as they should be."""
        self.work_of(attempt.worker).add(reply, len(attempt.pairs))
        self.ejections.answered(attempt.worker.address)
        if attempt.size:
            self._times_of(attempt.worker).add(attempt.rows, reply.round_trip)

    def failed(self, attempt: Attempt, error: ConsiliumError) -> None:
        """There are no rows. Who fails again and again is left alone, but for what nobody else holds."""
        worker = attempt.worker
        self.work_of(worker).failures += 1
        if isinstance(error, Overloaded | StalePlacement):  # it does what it should
            return
        group = [each.address for each in self.workers.values() if each.group == worker.group]
        out = sum(address in group for address in self.ejections.out)
        if self.ejections.failed(worker.address, len(group), out):
            log.warning("worker %s is left alone for a while: it failed again and again: %s", worker.address, error)
            self.work_of(worker).ejections += 1
            self._stand(worker.address)
            self.on_change()

    def abandon(self, attempt: Attempt) -> None:
        """Nobody waits for it any more. Until it is answered its worker is asked for nothing that others hold."""
        self.leave(attempt)
        self.work_of(attempt.worker).late += 1
        self._stand(attempt.worker.address)

    def leave(self, attempt: Attempt) -> None:
        """Nobody waits for it any more; its memory is released when it is answered."""
        self._unattended.append(attempt)
        attempt.call.then = partial(self._came_late, attempt)
        if attempt.call.outcome is not None:  # it came just now
            self._came_late(attempt, attempt.call.outcome)

    def give_up(self) -> None:
        """End what nobody waits for and nobody has answered in time."""
        if not self._unattended and not self._probes:
            return
        now = time.monotonic()
        for attempt in [each for each in self._unattended if each.call.deadline <= now]:
            attempt.call.expire()
        for call in [each for each in self._probes if each.deadline <= now]:
            call.expire()

    def condemn(self, worker: Worker, frame: Frame, others: Collection[str]) -> None:
        """Its numbers are wrong: it gets nothing until it has been started anew."""
        log.error(
            "worker %s gets no more frames: its rows of layer %d, experts %s are not those of %s",
            worker.address,
            frame.layer,
            frame.experts,
            ", ".join(others) or "the checkpoint",
        )
        self.work_of(worker).lies += 1
        if worker.address in self.workers:
            self._liars[worker.address] = worker.identity
            self._arrange()
        self.on_liar()
        self.on_change()

    # -- probation -----------------------------------------------------------------------------------------------

    def on_probation(self) -> list[Worker]:
        """Who is to be tried now."""
        if not self.ejections.out:
            return []
        waiting = [each for each in self.ejections.out if self.ejections.wants_probe(each)]
        return [self.workers[address] for address in waiting if address in self.workers]

    def holds(self, worker: Worker, layer: int, expert: int) -> bool:
        """Whether it may be asked for this expert."""
        return worker.address in self.placement.holders.get((layer, expert), ())

    def probe(self, worker: Worker, frame: Frame, rows: Callable[[Reply], object]) -> None:
        """See whether it answers ``frame``; ``rows`` raises WireError where that is no answer."""
        self.ejections.probing(worker.address)
        call = worker.send(frame, time.monotonic() + worker.time_limit(len(frame.indices)))
        self._probes.append(call)
        call.then = partial(self._probed, worker.address, call, rows)

    def _probed(
        self, address: str, call: Completion[Reply], rows: Callable[[Reply], object], outcome: Reply | Exception
    ) -> None:
        self._probes.remove(call)
        good = isinstance(outcome, Reply)
        if isinstance(outcome, Reply):
            try:
                rows(outcome)
            except WireError:
                good = False
            outcome.release()
        if self.ejections.probed(address, good=good):
            log.info("worker %s is back: it answers again", address)
            self._stand(address)
            self.on_change()

    # -- what was done -------------------------------------------------------------------------------------------

    def work_of(self, worker: Worker) -> Work:
        """Where to count what it does."""
        work = self._work.get(worker.address)
        if work is None:
            work = self._work[worker.address] = Work(worker.group)
        return work

    def take_stats(self) -> list[WorkerStats]:
        """What each worker did since the last call."""
        work, self._work = self._work, {}
        return [each.stats(address) for address, each in work.items()]

    def _times_of(self, worker: Worker) -> RowTimes:
        times = self._times.get(worker.address)
        if times is None:
            times = self._times[worker.address] = RowTimes()
        return times

    def _came_late(self, attempt: Attempt, outcome: Reply | Exception) -> None:
        self._unattended.remove(attempt)
        self.ended(attempt)
        if isinstance(outcome, Reply):
            outcome.release()
            self._times_of(attempt.worker).add(attempt.rows, outcome.round_trip)
        elif isinstance(outcome, ConsiliumError):
            self.failed(attempt, outcome)
        self._stand(attempt.worker.address)

    def _arrange(self) -> None:
        """Without those who lied, and with whoever is in doubt as the last resort."""
        self.placement = self._told.without(self._liars) if self._liars else self._told
        self.fleet.arrange(self.placement.addresses, self._stated)
        for address in {*self.ejections.out, *(each.worker.address for each in self._unattended)}:
            self._stand(address)
        changed, self.changed = self.changed, Completion(inf, lambda: None)
        changed.settle(True)

    def _stand(self, address: str) -> None:
        late = any(each.worker.address == address for each in self._unattended)
        self.fleet.doubt(address, doubtful=late or address in self.ejections.out)
