"""The loop that leads: who is there, who shall hold what, and telling it. Every router runs it; one at a time leads.

A placement is never made from less than is known: after a start, and after the store has lost its data, whoever has
not been heard of for one lease yet may well be alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable

from consilium.config import RouterConfig
from consilium.errors import NotReady
from protos.router.v1 import router_pb2
from router_service.deployment import Deployment
from router_service.holdings import Expert, Records, balance_of, held_by, holders_of, pairs_of, spec_of
from router_service.load import enough, total
from router_service.placement import Demand, Policy, place
from router_service.placement.plan import Holders
from router_service.store import Store
from router_service.transition import Transition

logger = logging.getLogger(__name__)

TICK = 0.25  # seconds
LEADER_SECONDS = 3.0  # after a leader's last tick another router takes over
QUIET = 1.0  # seconds without a new worker after which a first placement is made of those there are


class Controller:
    """Keeps the state that this router serves up to date, and makes it while it leads."""

    def __init__(
        self,
        deployment: Deployment,
        config: RouterConfig,
        store: Store,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployment, self._config, self._store, self._clock = deployment, config, store, clock
        self._policy = Policy(config.replicas, config.move_cost, config.tolerance)
        self.state = router_pb2.RouterState()
        self.leads = False
        self.demand = total(deployment.layers, deployment.experts, [])
        self.missing = len(deployment.layers) * deployment.experts
        self._changed, self._poked = asyncio.Event(), asyncio.Event()
        self._transition = Transition(deployment.layers, deployment.experts)
        self._target: Holders | None = None
        self._members: frozenset[tuple[str, bool, frozenset[Expert]]] = frozenset()
        self._loads: list[bytes] = []
        self.records: Records = {}  # of those that are alive, or may be
        self.gateways: dict[str, int] = {}  # the epoch that each of them uses
        self.counts = Counter[str]()  # for the metrics
        self._balance: tuple[router_pb2.RouterState, Demand, float] | None = None
        self._generation = ""
        self._unknown_until = 0.0  # those that are missing from the store are presumed alive until then
        self._looked = self._started = self._joined = self._rebalanced = clock()

    async def run(self) -> None:
        """Tick until cancelled."""
        reported = ""
        while True:
            try:
                await self.tick()
                reported = ""
            except NotReady as error:
                if error.message != reported:  # not the same again at every tick
                    logger.warning("the state cannot be reached; what is known stays in force: %s", error.message)
                reported = error.message
            self._poked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), TICK)

    def balance(self) -> float:
        """Busiest over mean in the worst layer; 0 while nothing is known of the load. Any thread may ask.

        It takes a while for many experts, and is computed once for each placement and load.
        """
        state, demand, known = self.state, self.demand, self._balance
        if known is None or known[0] is not state or known[1] is not demand:
            known = self._balance = state, demand, balance_of(state, self.records, demand)
        return known[2]

    def poke(self) -> None:
        """Something has changed: look at once."""
        self._poked.set()

    async def watch(self, known: int) -> AsyncIterator[router_pb2.Placement]:
        """The present placement unless its epoch is ``known``, and every later one that is not overtaken."""
        while True:
            changed = self._changed
            if self.state.placement.epoch not in (0, known):
                known = self.state.placement.epoch
                yield self.state.placement
            await changed.wait()

    async def tick(self) -> None:
        """Look at the store, and change what is to be changed. Raises NotReady where it cannot be reached."""
        stored = await self._store.state()
        if stored is not None and stored.placement.epoch != self.state.placement.epoch:
            self._serve(stored)
        records, self.gateways = await self._present(), await self._store.gateways()
        leads = await self._store.lead(LEADER_SECONDS)
        if leads != self.leads:
            logger.info("this router leads" if leads else "another router leads")
            self.leads, self._target = leads, None
        # Where nobody is heard of, it is more likely the router that is cut off: gateways keep what they have.
        if not leads or not records or not self._may_place(records):
            return
        await self._aim(records)
        assert self._target is not None
        before = router_pb2.RouterState()
        before.CopyFrom(self.state)
        if not before.placement.epoch:  # greater than any of a router that was here before, without asking anybody
            before.placement.epoch = int(time.time() * 1000)
        state = self._transition.step(before, records, self._target, self._clock(), self.gateways.values())
        if state == self.state:
            return
        if await self._store.write_state(state, 0 if stored is None else stored.placement.epoch):
            self._serve(state)
        else:
            self.leads, self._target = False, None

    def _serve(self, state: router_pb2.RouterState) -> None:
        self.state = state
        held = {
            (each.layer, expert)
            for worker in state.placement.workers
            for each in worker.experts
            for expert in each.experts
        }
        self.missing = len(self._deployment.layers) * self._deployment.experts - len(held)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _present(self) -> Records:
        """The workers that are alive, or may be."""
        found, generation = await self._store.workers(), await self._store.generation()
        now = self._clock()
        blind = now - self._looked > self._config.lease / 2  # leases may have ended because nobody could renew them
        if self._generation and (generation != self._generation or blind):
            logger.warning("leases were lost; workers are taken for alive for %g s more", self._config.lease)
            self._unknown_until = now + self._config.lease
        self._generation, self._looked = generation, now
        if now < self._unknown_until:
            found = {**{name: each for name, each in self.records.items() if not each.draining}, **found}
        if found.keys() - self.records.keys():
            self._joined = now
        for name in self.records.keys() - found.keys():
            gone = self.records[name]
            what = "has left" if gone.draining else f"was not heard of for {self._config.lease:g} s: taken for dead"
            logger.warning("worker %s at %s %s", name[:8], gone.worker.address, what)
            self.counts["departures"] += 1
        self.records = found
        return found

    def _may_place(self, records: Records) -> bool:
        """Whether enough is known for a first placement: all experts are held, or who is missing had time to come."""
        if self._target is not None:
            return True
        holders, now = holders_of(held_by(records)), self._clock()
        if len(holders) == len(self._deployment.layers) * self._deployment.experts:
            return True
        nobody_holds = not holders and bool(records) and not self.state.placement.epoch
        patience = self._config.lease if self._config.patience is None else self._config.patience
        return now - self._started >= patience or (nobody_holds and now - self._joined >= QUIET)

    async def _aim(self, records: Records) -> None:
        """Make a new target where workers have come, gone or want to leave, or the load is another one."""
        now = self._clock()
        loads = await self._store.loads()
        demand = total(self._deployment.layers, self._deployment.experts, loads)
        known = enough(demand, self._config.load_half_life)
        if known and loads != self._loads:  # what is computed from it stays as long as it does
            self.demand, self._loads = demand, loads
        members = frozenset((name, each.draining, pairs_of(each.failed)) for name, each in records.items())
        changed = self._target is None or members != self._members
        due = known and now - self._rebalanced >= self._config.rebalance and self._settled(records)
        if not changed and not due:
            return
        self._members, self._rebalanced = members, now
        self._target = await asyncio.to_thread(self._place, records, self.demand)

    def _settled(self, records: Records) -> bool:
        """Whether everybody holds what the last target wants."""
        target = self._target or {}
        holders = holders_of(held_by(records))
        return all(set(names) <= set(holders.get(expert, ())) for expert, names in target.items())

    def _place(self, records: Records, demand: Demand) -> Holders:
        specs = [spec_of(name, record) for name, record in records.items()]
        # What is on its way counts as held, and what is about to be dropped does not; of newcomers what they bring.
        before = self._target or {}
        placed = {name for names in before.values() for name in names}
        brought = holders_of({name: each for name, each in held_by(records).items() if name not in placed})
        failed = {each.name: each.failed for each in specs}
        held = {
            expert: tuple(
                name
                for name in (*before.get(expert, ()), *brought.get(expert, ()))
                if expert not in failed.get(name, ())
            )
            for expert in before.keys() | brought.keys()
        }
        plan = place(specs, held, demand, self._policy)
        self.counts.update(placements=1, loads=len(plan.loads), drops=len(plan.drops))
        logger.log(
            logging.INFO if plan.loads or plan.drops or plan.missing else logging.DEBUG,
            "placement of %d workers: %d copies to load, %d to drop, %d experts without room",
            *(len(specs), len(plan.loads), len(plan.drops), len(plan.missing)),
        )
        return plan.holders
