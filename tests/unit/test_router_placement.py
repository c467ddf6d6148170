"""Placement is pure: invariants for any workers, any load and anything held before; and what it is for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import eplb
from bench.placement import more_room, workers, zipf
from router_service.placement import Demand, Plan, Policy, WorkerSpec, levels, place
from router_service.placement.homes import find_homes

Holders = dict[tuple[int, int], tuple[str, ...]]


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[WorkerSpec], Holders, Demand, Policy]:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    specs = [
        WorkerSpec(
            f"w{index}",
            capacity=draw(st.integers(0, layers * experts + 2)),
            row_seconds=draw(st.sampled_from([1e-6, 1e-5, 1e-4])),
            read_seconds=draw(st.sampled_from([1e-6, 1e-4])),
            host=draw(st.sampled_from(["", "h0", "h1"])),
            leaving=draw(st.integers(0, 5)) == 0,
            failed=frozenset(
                draw(st.sets(st.tuples(st.integers(0, layers - 1), st.integers(0, experts - 1)), max_size=3))
            ),
        )
        for index in range(draw(st.integers(0, 5)))
    ]
    everyone = st.sampled_from([*(each.name for each in specs), "gone"])
    pairs = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    held = {each: tuple(sorted(draw(st.sets(everyone, max_size=2)))) for each in pairs if draw(st.booleans())}
    rows = np.array(draw(st.lists(st.floats(0, 1e4), min_size=len(pairs), max_size=len(pairs))))
    demand = Demand(tuple(range(layers)), rows.reshape(layers, experts), np.sqrt(rows).reshape(layers, experts))
    return specs, held, demand, Policy(replicas=draw(st.integers(1, 3)), gate_groups=1)


def in_use(plan: Plan) -> Counter[str]:
    return Counter(name for names in plan.holders.values() for name in names)


def test_an_expert_with_copies_that_nobody_asks_for_makes_nobody_busy() -> None:
    specs = [WorkerSpec(name, capacity=2, row_seconds=1e-6, read_seconds=1e-6) for name in ("a", "b")]
    demand = Demand((0,), np.array([[0.0, 8.0]]), np.array([[0.0, 2.0]]))
    busy, mean = levels(specs, {(0, 0): ("a", "b"), (0, 1): ("a", "b")}, demand)
    assert busy.tolist() == [pytest.approx([5e-6, 5e-6])]
    assert mean.tolist() == pytest.approx([5e-6])


@given(situations())
@settings(max_examples=150, deadline=None)
def test_what_holds_for_every_plan(situation: tuple[list[WorkerSpec], Holders, Demand, Policy]) -> None:
    specs, held, demand, policy = situation
    plan = place(specs, held, demand, policy)
    known = {each.name: each for each in specs}
    every = [(layer, expert) for layer in demand.layers for expert in range(demand.rows.shape[1])]
    assert sorted([*plan.holders, *plan.missing]) == every
    for expert, names in plan.holders.items():
        assert names
        assert list(names) == sorted(set(names))  # no worker twice
        assert set(names) <= set(known)  # nobody who is gone
        fresh = [known[each] for each in names if each not in held.get(expert, ())]
        assert not any(each.leaving or expert in each.failed for each in fresh)
        for each in fresh:  # copies held before may be too near; no new one is
            assert not each.host or [known[other].host for other in names].count(each.host) == 1
    for name, count in in_use(plan).items():
        assert count <= known[name].capacity or known[name].leaving
    before = {(name, *expert) for expert, names in held.items() for name in names if name in known}
    after = {(name, *expert) for expert, names in plan.holders.items() for name in names}
    assert set(plan.loads) == after - before
    assert set(plan.drops) == before - after
    assert place(list(reversed(specs)), held, demand, policy) == plan


@given(situations())
@settings(max_examples=100, deadline=None)
def test_what_there_is_room_for_is_placed(situation: tuple[list[WorkerSpec], Holders, Demand, Policy]) -> None:
    specs, held, demand, policy = situation
    staying = [replace(each, host="", failed=frozenset()) for each in specs if not each.leaving]
    experts = demand.rows.size
    plan = place(staying, held, demand, replace(policy, replicas=1))
    assert bool(plan.missing) == (sum(min(each.capacity, experts) for each in staying) < experts)


@given(situations())
@settings(max_examples=50, deadline=None)
def test_nothing_moves_when_nothing_has_changed(situation: tuple[list[WorkerSpec], Holders, Demand, Policy]) -> None:
    specs, held, demand, policy = situation
    plan = place(specs, held, demand, policy)
    again = place(specs, plan.holders, demand, replace(policy, move_cost=0.2))
    costs = len(again.loads) * 0.2 / max(1, len(specs))
    staying = [each for each in specs if not each.leaving]
    if again.loads and all(len(names) >= policy.replicas for names in plan.holders.values()) and not plan.missing:
        (busy, mean), (later, _) = levels(staying, plan.holders, demand), levels(staying, again.holders, demand)
        gained = ((busy.max(axis=1) - later.max(axis=1)) / np.maximum(mean, 1e-12)).sum()
        assert gained >= costs * 0.5  # the planner also counts a little load for what nobody asks for


def balance(specs: Sequence[WorkerSpec], plan: Plan, demand: Demand) -> float:
    busy, mean = levels(specs, plan.holders, demand)
    return float((busy.max(axis=1) / mean).max())


def test_a_skewed_load_is_shared_by_unequal_workers() -> None:
    specs, demand = workers([(1, 12), (2, 16), (2, 24), (4, 32)]), zipf(1, 64, 1.0)
    assert balance(specs, place(specs, {}, demand, Policy()), demand) <= 1.15
    twice = more_room(specs, 2)
    assert balance(twice, place(twice, {}, demand, Policy(replicas=2)), demand) <= 1.15


def test_reading_many_experts_counts_like_computing_many_rows() -> None:
    """One expert has all the rows, the others are read as often: a CPU that reads slowly gets fewer of those."""
    reader = WorkerSpec("reads-slowly", 16, row_seconds=1e-5, read_seconds=1e-3)
    other = WorkerSpec("computes-slowly", 16, row_seconds=1e-4, read_seconds=1e-4)
    demand = Demand((0,), np.array([[1000.0] + [10.0] * 15]), np.full((1, 16), 10.0))
    plan = place([reader, other], {}, demand, Policy())
    assert balance([reader, other], plan, demand) < 1.15
    assert in_use(plan)["reads-slowly"] < in_use(plan)["computes-slowly"]


def test_a_dead_worker_costs_no_more_moves_than_it_held() -> None:
    specs, demand = workers([(1, 40)] * 5), zipf(2, 64, 0.5)
    plan = place(specs, {}, demand, Policy())
    lost = in_use(plan)[specs[0].name]
    after = place(specs[1:], plan.holders, demand, Policy(move_cost=1.0))
    assert not after.missing
    assert len(after.loads) <= lost
    assert not after.drops


def test_a_hot_expert_gains_copies_and_loses_them_when_others_need_the_room() -> None:
    specs, calm = workers([(1, 5)] * 4), Demand((0,), np.full((1, 16), 10.0), np.ones((1, 16)))
    plan = place(specs, {}, calm, Policy())
    assert all(len(names) == 1 for names in plan.holders.values())
    hot = Demand((0,), calm.rows + 200 * (np.arange(16) == 3), calm.reads)
    hotter = place(specs, plan.holders, hot, Policy())
    assert len(hotter.holders[0, 3]) > 1
    other = Demand((0,), calm.rows + 200 * (np.arange(16) == 7), calm.reads)
    moved = place(specs, hotter.holders, other, Policy())
    assert len(moved.holders[0, 7]) > 1
    assert {move.expert for move in moved.drops} == {3}
    wavering = Demand((0,), hot.rows * np.linspace(0.98, 1.02, 16), hot.reads)
    assert not place(specs, hotter.holders, wavering, Policy()).loads


def test_who_leaves_keeps_only_what_nobody_else_has_room_for() -> None:
    demand = Demand((0,), np.ones((1, 4)), np.ones((1, 4)))
    held = {(0, expert): ("old",) for expert in range(4)}
    leaving, small = WorkerSpec("old", 4, leaving=True), WorkerSpec("new", 3)
    plan = place([leaving, small], held, demand, Policy())
    assert in_use(plan) == {"new": 3, "old": 1}
    assert place([leaving, replace(small, capacity=4)], held, demand, Policy()).holders == dict.fromkeys(held, ("new",))


def test_copies_that_are_not_needed_make_room_for_what_is_missing() -> None:
    specs, demand = [WorkerSpec(name, 6) for name in ("a", "b")], Demand((0, 1, 2), np.ones((3, 4)), np.ones((3, 4)))
    copied: Holders = {(layer, expert): ("a", "b") for layer in (0, 1) for expert in range(3)}
    plan = place(specs, copied, demand, Policy())
    assert not plan.missing
    assert in_use(plan) == {"a": 6, "b": 6}


def test_groups_of_a_node_limited_gate_stay_on_one_host() -> None:
    specs = [WorkerSpec(f"w{index}", 8, host=f"h{index // 2}") for index in range(8)]  # 4 hosts of 16 places
    demand = zipf(1, 32, 0.7)
    plan = place(specs, {}, demand, Policy(gate_groups=8))
    hosts = {each.name: each.host for each in specs}
    for group in range(8):
        members = range(group * 4, group * 4 + 4)
        assert len({hosts[name] for expert in members for name in plan.holders[0, expert]}) == 1
    both = place(specs, {}, demand, Policy(gate_groups=8, replicas=2))
    for group in range(8):
        members = range(group * 4, group * 4 + 4)
        assert len({hosts[name] for expert in members for name in both.holders[0, expert]}) == 2


def test_without_labels_groups_go_anywhere() -> None:
    assert find_homes(np.ones((8, 2)), ["", ""], np.array([8, 8]), 4, 1).all()


def test_two_workers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        place([WorkerSpec("w", 1), WorkerSpec("w", 1)], {}, zipf(1, 4, 1.0), Policy())


def test_eplb_gives_spare_slots_to_the_largest_load_per_copy() -> None:
    assert Counter(eplb.replicate(np.array([8.0, 3.0, 1.0]), 6).tolist()) == {0: 3, 1: 2, 2: 1}
    placed = eplb.balance(np.array([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86.0]), 8, 16, 4, 2)
    assert sorted(len(each) for each in placed) == [2] * 8
    assert {expert for each in placed for expert in each} == set(range(12))
    first_node = {expert // 3 for each in placed[:4] for expert in each}
    assert len(first_node) == 2  # groups stay together
