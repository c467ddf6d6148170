"""A router's decisions over time, on a clock of the test's own: leases, placements in motion, what is not known."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import numpy as np
import pytest

from consilium.config import RouterConfig
from consilium.errors import NotReady
from protos.router.v1 import router_pb2
from router_service.controller import QUIET, Controller
from router_service.holdings import expert_sets, pairs_of
from router_service.load import pack
from router_service.placement import Demand
from router_service.store import MemoryStore
from router_service.transition import DROP_SECONDS
from tests.router_workers import DEPLOYMENT, EVERYTHING, EXPERTS, LAYERS, LEFT, RIGHT, layer_experts, record

LEASE = 10.0
CONFIG = RouterConfig(lease=LEASE, rebalance=5)


class World:
    """One router, and workers that do what they are told when the test says so."""

    def __init__(self, config: RouterConfig = CONFIG) -> None:
        self.now = 100.0
        self.config = config
        self.store = Lossy(lambda: self.now)
        self.controller = Controller(DEPLOYMENT, config, self.store, lambda: self.now)

    def restart(self) -> None:
        """The router starts anew, with nothing in its memory."""
        self.store = Lossy(lambda: self.now)
        self.controller = Controller(DEPLOYMENT, self.config, self.store, lambda: self.now)

    async def join(self, name: str, held: Iterable[tuple[int, int]] = (), capacity: int = 8) -> None:
        await self.store.put_worker(record(name, held, capacity=capacity), LEASE)

    async def pass_time(self, seconds: float, dead: Iterable[str] = ()) -> None:
        """Everybody but the ``dead`` renews, and the router looks, every second."""
        for _ in range(int(seconds)):
            self.now += 1.0
            for name in await self.store.workers():
                if name not in dead:
                    await self.store.renew(name, LEASE)
            await self.controller.tick()

    async def obey(self) -> None:
        """Every worker loads and drops what it is told; then the router looks."""
        for each in self.controller.state.wanted:
            known = (await self.store.workers()).get(each.worker_id)
            if known is not None:
                del known.held[:]
                known.held.extend(layer_experts(pairs_of(each.experts)))
                await self.store.put_worker(known, LEASE)
        await self.controller.tick()

    @property
    def holders(self) -> dict[tuple[int, int], set[str]]:
        """Who gateways may ask."""
        found: dict[tuple[int, int], set[str]] = {}
        for each in self.controller.state.placement.workers:
            for expert in pairs_of(each.experts):
                found.setdefault(expert, set()).add(each.worker_id)
        return found

    def wanted(self, name: str) -> frozenset[tuple[int, int]]:
        return next(pairs_of(each.experts) for each in self.controller.state.wanted if each.worker_id == name)


class Lossy(MemoryStore):
    """A store that may be out of reach, or lose everything."""

    reachable = True

    async def workers(self) -> dict[str, router_pb2.WorkerRecord]:
        if not self.reachable:
            raise NotReady("out of reach")
        return await super().workers()

    def lose(self) -> None:
        self.__init__(self._clock)  # type: ignore[misc]  # as a server that has been started again


def run(body: Callable[[World], Awaitable[None]], config: RouterConfig = CONFIG) -> None:
    async def main() -> None:
        await body(World(config))

    asyncio.run(main())


def test_workers_that_hold_everything_are_used_at_once() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.controller.tick()
        assert not world.controller.state.placement.epoch
        await world.join("b", RIGHT)
        await world.controller.tick()
        assert world.controller.state.placement.epoch
        assert world.holders.keys() == set(EVERYTHING)
        assert world.controller.missing == 0
        hashes = world.controller.state.placement.hashes
        assert [(each.layer, len(each.hashes)) for each in hashes] == [(layer, 16 * EXPERTS) for layer in LAYERS]

    run(body)


def test_workers_that_hold_nothing_are_told_what_to_load_once_nobody_else_comes() -> None:
    async def body(world: World) -> None:
        await world.join("a", capacity=4)
        await world.controller.tick()
        await world.join("b", capacity=4)
        await world.controller.tick()
        assert not world.controller.state.wanted
        world.now += QUIET
        await world.controller.tick()
        assert world.wanted("a") | world.wanted("b") == set(EVERYTHING)
        assert not world.holders
        await world.obey()
        assert world.holders.keys() == set(EVERYTHING)

    run(body)


def test_a_new_worker_loads_before_gateways_are_told_and_the_old_one_drops_after_them() -> None:
    async def body(world: World) -> None:
        await world.join("a", EVERYTHING)
        await world.controller.tick()
        await world.join("b")
        await world.controller.tick()
        moved = world.wanted("b")
        assert moved
        assert world.wanted("a") == set(EVERYTHING)
        assert all(names == {"a"} for names in world.holders.values())
        before = world.controller.state.placement.epoch
        await world.obey()
        assert world.controller.state.placement.epoch > before
        assert all(("b" in world.holders[each]) == (each in moved) for each in EVERYTHING)
        gone = {each for each in EVERYTHING if "a" not in world.holders[each]}
        assert gone <= world.wanted("a")  # gateways may not have heard yet
        await world.pass_time(DROP_SECONDS + 1)
        assert world.wanted("a") == set(EVERYTHING) - gone

    run(body)


def test_what_a_gateway_still_uses_is_kept_as_long_as_the_gateway_may_be_there() -> None:
    async def body(world: World) -> None:
        await world.join("a", EVERYTHING, capacity=4)
        await world.controller.tick()
        await world.store.put_gateway("cut-off", world.controller.state.placement.epoch, 60)
        await world.join("b")
        await world.controller.tick()
        await world.obey()
        gone = {each for each in EVERYTHING if "a" not in world.holders[each]}
        assert gone
        await world.store.put_gateway("follows", world.controller.state.placement.epoch, 600)
        await world.pass_time(50)
        assert world.wanted("a") == set(EVERYTHING)
        await world.pass_time(12)
        assert world.wanted("a") == set(EVERYTHING) - gone

    run(body)


def test_what_a_worker_cannot_load_goes_to_another_one() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.join("c")
        await world.controller.tick()
        wanted = min(world.wanted("c"))
        broken = (await world.store.workers())["c"]
        broken.failed.extend(expert_sets([wanted]))
        await world.store.put_worker(broken, LEASE)
        await world.controller.tick()
        assert wanted not in world.wanted("c")
        assert world.holders.keys() == set(EVERYTHING)
        dead = "a" if "a" in world.holders[wanted] else "b"
        await world.pass_time(LEASE + 2, dead=[dead])
        assert wanted not in world.wanted("c")
        assert wanted in world.wanted("ab".replace(dead, ""))

    run(body)


def test_a_worker_whose_lease_ends_is_replaced() -> None:
    async def body(world: World) -> None:
        await world.join("a", EVERYTHING)
        await world.join("b", LEFT)
        await world.controller.tick()
        await world.pass_time(LEASE - 1, dead=["a"])
        assert any("a" in names for names in world.holders.values())
        await world.pass_time(2, dead=["a"])
        assert world.controller.missing == 4
        await world.obey()
        assert world.holders == {expert: {"b"} for expert in EVERYTHING}

    run(body)


def test_when_nobody_is_heard_of_any_more_the_placement_stays() -> None:
    async def body(world: World) -> None:
        await world.pass_time(2 * LEASE)
        assert not world.controller.state.placement.epoch  # none without any worker
        await world.join("a", EVERYTHING)
        await world.controller.tick()
        holders = world.holders
        await world.pass_time(3 * LEASE, dead=["a"])
        assert world.holders == holders == {expert: {"a"} for expert in EVERYTHING}

    run(body)


def test_a_worker_that_leaves_is_needed_until_others_hold_what_it_holds() -> None:
    async def body(world: World) -> None:
        await world.join("a", EVERYTHING)
        await world.join("b")
        await world.controller.tick()
        leaving = (await world.store.workers())["a"]
        leaving.draining = True
        await world.store.put_worker(leaving, LEASE)
        await world.controller.tick()
        assert world.holders.keys() == set(EVERYTHING)
        assert world.wanted("b") == set(EVERYTHING)
        await world.obey()
        assert world.holders == {expert: {"b"} for expert in EVERYTHING}

    run(body)


def test_a_router_that_starts_anew_waits_for_the_workers_it_does_not_know_yet() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.controller.tick()
        epoch = world.controller.state.placement.epoch
        world.restart()
        await world.join("a", LEFT)
        await world.pass_time(LEASE - 1)
        assert not world.controller.state.placement.epoch  # gateways keep what they have
        await world.join("b", RIGHT)
        await world.controller.tick()
        assert world.controller.state.placement.epoch >= epoch
        assert world.holders.keys() == set(EVERYTHING)
        assert world.wanted("a") == set(LEFT)

    run(body)


def test_who_does_not_come_back_within_one_lease_is_dead() -> None:
    async def body(world: World) -> None:
        world.restart()
        await world.join("a", LEFT)
        await world.pass_time(LEASE + 1)
        assert world.wanted("a") == set(EVERYTHING)

    run(body)


def test_while_others_may_still_bring_the_rest_nobody_is_told_to_load_it() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.pass_time(4 * LEASE)
        assert not world.controller.state.placement.epoch
        await world.join("b", RIGHT)
        await world.controller.tick()
        assert world.wanted("a") == set(LEFT)
        assert world.wanted("b") == set(RIGHT)

    run(body, RouterConfig(lease=LEASE, patience=600))


def test_lost_leases_are_unknown_and_not_dead() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.controller.tick()
        holders = world.holders
        world.store.lose()
        await world.pass_time(1)
        await world.join("a", LEFT)  # with its next heartbeat
        await world.pass_time(LEASE - 2)
        assert world.holders == holders
        assert world.wanted("a") == set(LEFT)
        await world.pass_time(3)
        assert world.wanted("a") == set(EVERYTHING)  # now b is dead

    run(body)


def test_leases_that_nobody_could_renew_are_unknown_too() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.controller.tick()
        holders = world.holders
        world.store.reachable = False
        for _ in range(3):
            world.now += LEASE
            with pytest.raises(NotReady):
                await world.controller.tick()
        world.store.reachable = True
        await world.controller.tick()
        assert world.holders == holders
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.pass_time(LEASE + 1)
        assert world.holders == holders

    run(body)


def test_a_hot_expert_gets_another_copy_and_chance_moves_nothing() -> None:
    async def body(world: World) -> None:
        await world.join("a", LEFT)
        await world.join("b", RIGHT)
        await world.controller.tick()
        few = Demand(LAYERS, np.array([[1.0, 0, 0, 0]] * 2) / 60, np.ones((2, 4)) / 60)
        await world.store.put_load("r", pack(few), 1e6)
        await world.pass_time(2 * CONFIG.rebalance)
        assert all(len(names) == 1 for names in world.holders.values())
        hot = Demand(LAYERS, np.array([[1000.0, 10, 10, 10]] * 2), np.full((2, 4), 10.0))
        await world.store.put_load("r", pack(hot), 1e6)
        await world.pass_time(2 * CONFIG.rebalance)
        await world.obey()
        assert world.holders[0, 0] == world.holders[1, 0] == {"a", "b"}

    run(body)


def test_who_watches_hears_of_every_epoch_it_does_not_know() -> None:
    async def body(world: World) -> None:
        await world.join("a", EVERYTHING)
        await world.controller.tick()
        watch = world.controller.watch(0)
        first = await asyncio.wait_for(anext(watch), 10)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        assert not following.done()
        await world.join("b", EVERYTHING)
        await world.controller.tick()
        assert (await asyncio.wait_for(following, 10)).epoch > first.epoch

    run(body)
