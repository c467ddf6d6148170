"""Placement and assignment are pure: no workers here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.epochs import PlacedWorker
from gateway.fleet import FRAME_COST, Fleet, frame_size
from gateway.placement import (
    ExpertIdentity,
    KnownExperts,
    assign,
    assign_owned,
    build_placement,
    describe_missing,
)
from tests.unit.model_configs import tiny_config


def test_replicas_are_listed_for_each_expert() -> None:
    placement = build_placement({"b:1": [(0, 0), (0, 1)], "a:1": [(0, 1)]})
    assert placement.holders == {(0, 0): ("b:1",), (0, 1): ("a:1", "b:1")}


def test_missing_experts_are_named_in_ranges() -> None:
    config = tiny_config(num_layers=2, num_experts=6)
    placement = build_placement({"a:1": [(0, e) for e in (0, 1, 5)] + [(1, e) for e in (0, 1, 5)]})
    missing = placement.missing(config)
    assert missing == [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4)]
    assert describe_missing(missing) == "no worker holds experts 2-4 of layers 0-1"


def test_dense_layers_miss_nothing() -> None:
    config = tiny_config(num_layers=2, num_experts=1, moe_layers=(False, True))
    assert build_placement({"a:1": [(1, 0)]}).missing(config) == []


@dataclass
class Case:
    """Rows and holders of each expert of a layer."""

    rows: dict[int, int]
    holders: Mapping[int, tuple[str, ...]]
    fleet: Fleet = field(default_factory=Fleet)

    def __post_init__(self) -> None:
        self.placement = build_placement(
            {
                address: [(0, expert) for expert, mine in self.holders.items() if address in mine]
                for mine in self.holders.values()
                for address in mine
            }
        )
        self.fleet.arrange(self.placement.addresses)

    def assign(self, turn: int = 0, excluded: tuple[str, ...] = ()) -> tuple[dict[str, list[int]], list[int]]:
        """The experts of each address, and those nobody takes."""
        experts = np.array(sorted(self.rows), np.int64)
        counts = np.array([self.rows[each] for each in experts.tolist()], np.int64)
        plan, orphans = assign(self.placement.of_layer(0), experts, counts, self.fleet, turn, excluded)
        return {address: experts[mine].tolist() for address, mine in plan.items()}, experts[orphans].tolist()

    def busy(self, plan: dict[str, list[int]]) -> list[float]:
        """µs that each worker then has to do."""
        sizes = {each: sum(frame_size(1, self.rows[expert]) for expert in mine) for each, mine in plan.items()}
        return [self.fleet.unit[place] * sizes.get(each, 0) for each, place in self.fleet.index.items()]


def learn(fleet: Fleet, **microseconds: float) -> None:
    """What a row takes each of them."""
    for address, each in microseconds.items():
        fleet.sent(address, 100)
        fleet.ended(address, 100, int(100 * each))


EXPERTS = st.dictionaries(st.integers(0, 40), st.integers(1, 300), min_size=1)
HOLDERS = st.dictionaries(st.integers(0, 20), st.sets(st.sampled_from("abc")), min_size=1)


@given(EXPERTS, st.integers(0, 100), st.sampled_from([(1, 1), (2, 2), (1, 3)]))
def test_full_replicas_end_nearly_even(rows: dict[int, int], turn: int, speeds: tuple[int, int]) -> None:
    case = Case(rows, dict.fromkeys(rows, ("a", "b")))
    learn(case.fleet, a=speeds[0], b=speeds[1])
    plan, orphans = case.assign(turn)
    assert not orphans
    assert sorted(expert for experts in plan.values() for expert in experts) == sorted(rows)
    one, other = case.busy(plan)
    assert abs(one - other) <= max(speeds) * frame_size(1, max(rows.values())) + FRAME_COST


@given(HOLDERS, st.integers(0, 5))
def test_an_expert_goes_to_a_holder_or_is_an_orphan(holders: dict[int, set[str]], turn: int) -> None:
    case = Case(dict.fromkeys(holders, 1), {expert: tuple(sorted(who)) for expert, who in holders.items()})
    plan, orphans = case.assign(turn)
    assert orphans == sorted(expert for expert, who in holders.items() if not who)
    assert sorted(orphans + [each for mine in plan.values() for each in mine]) == sorted(holders)
    for address, experts in plan.items():
        assert all(address in holders[expert] for expert in experts)


@given(st.dictionaries(st.integers(0, 20), st.sampled_from("abc"), min_size=1))
def test_where_there_is_no_choice_both_ways_to_plan_agree(owner: dict[int, str]) -> None:
    case = Case(dict.fromkeys(owner, 1), {expert: (who,) for expert, who in owner.items()})
    experts = np.array(sorted(owner), np.int64)
    plan = assign_owned(case.placement.of_layer(0), experts)
    assert plan is not None
    assert {address: experts[mine].tolist() for address, mine in plan.items()} == case.assign()[0]
    assert assign_owned(case.placement.of_layer(0), np.array([99])) is None


def test_turns_share_single_experts_among_replicas() -> None:
    case = Case({0: 1}, {0: ("a", "b", "c")})
    chosen = [next(iter(case.assign(turn)[0])) for turn in range(6)]
    assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]


def test_small_steps_take_few_frames_and_large_ones_all_workers() -> None:
    holders = dict.fromkeys(range(8), ("a", "b"))
    for microseconds, frames in ((0.1, 1), (100, 2)):
        case = Case(dict.fromkeys(holders, 1), holders)
        learn(case.fleet, a=microseconds, b=microseconds)
        assert len(case.assign()[0]) == frames
    case = Case(dict.fromkeys(range(9), 1), {**holders, 8: ("b",)})
    learn(case.fleet, a=0.1, b=0.1)
    assert case.assign()[0] == {"b": list(range(9))}  # it has a frame anyway


def test_whoever_has_much_to_do_or_is_slow_gets_less() -> None:
    case = Case({0: 1}, {0: ("a", "b")})
    case.fleet.sent("a", 1000)
    assert {next(iter(case.assign(turn)[0])) for turn in range(4)} == {"b"}
    case.fleet.ended("a", 1000)
    learn(case.fleet, a=5, b=50)
    assert {next(iter(case.assign(turn)[0])) for turn in range(4)} == {"a"}
    case.fleet.arrange(["b", "c"])
    assert case.fleet.unit.tolist() == [50, 50]  # what is known stays; a new one counts as fast as the fastest
    case.fleet.sent("a", 10)  # gone, with frames in flight
    case.fleet.ended("a", 10, 10)


def test_a_worker_that_was_not_measured_is_as_fast_as_the_router_says_against_the_others() -> None:
    case = Case({0: 1}, {0: ("a", "b"), 1: ("c",)})
    stated = {"a": PlacedWorker("g", {}, 1000, 80_000).row_us, "b": PlacedWorker("g", {}, 4000, 320_000).row_us}
    assert stated == {"a": 9.0, "b": 36.0}  # an expert and a row of it are nine
    case.fleet.arrange("abc", stated)
    assert case.fleet.unit.tolist() == [9, 36, 1]
    learn(case.fleet, a=18)
    assert case.fleet.unit.tolist() == [18, 72, 18]  # of c nobody knows anything
    assert {next(iter(case.assign(turn)[0])) for turn in range(4)} == {"a"}
    learn(case.fleet, b=5)
    assert case.fleet.unit.tolist()[:2] == [18, 5]


def test_a_worker_in_doubt_is_asked_only_where_nobody_else_can_be() -> None:
    case = Case({0: 1, 1: 1}, {0: ("a", "b"), 1: ("a",)})
    case.fleet.standing[case.fleet.index["a"]] = 1
    assert case.assign() == ({"a": [1], "b": [0]}, [])
    assert case.assign(excluded=("b", "nobody")) == ({"a": [0, 1]}, [])
    assert case.assign(excluded=("a",)) == ({"b": [0]}, [1])


def test_an_expert_that_computes_otherwise_than_before_is_noticed() -> None:
    experts = [(0, 0), (0, 1)]
    both, first = build_placement({"a": experts}), build_placement({"a": experts[:1]})
    old = dict.fromkeys(experts, ExpertIdentity(b"old", "class"))
    known = KnownExperts()
    assert not known.differ(both, old)
    assert not known.differ(first, {experts[0]: old[experts[0]]})  # one is gone
    assert not known.differ(build_placement({}), {})
    assert not known.differ(both, old)  # and back
    assert not known.differ(first, {experts[0]: old[experts[0]]})
    assert known.differ(both, {**old, experts[1]: ExpertIdentity(b"new", "class")})  # back with other weights
    new = {**old, experts[1]: ExpertIdentity(b"new", "class")}
    assert not known.differ(both, new)
    assert known.differ(both, {**new, experts[0]: ExpertIdentity(b"old", "another")})
    assert known.differ(both, {experts[1]: new[experts[1]]})  # two holders that compute it differently
