"""Placement and assignment are pure: no workers here."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.placement import (
    EXPERT_COST,
    ExpertIdentity,
    KnownExperts,
    assign,
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


def test_turns_share_single_experts_among_replicas() -> None:
    chosen = [next(iter(assign({0: 1}, {0: ("a", "b", "c")}, turn)[0])) for turn in range(6)]
    assert sorted(chosen) == ["a", "a", "b", "b", "c", "c"]


@given(
    st.dictionaries(st.integers(0, 40), st.integers(1, 300), min_size=1),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True),
    st.integers(0, 100),
)
def test_full_replicas_end_nearly_even(pairs: dict[int, int], workers: list[str], turn: int) -> None:
    plan, orphans = assign(pairs, dict.fromkeys(pairs, tuple(workers)), turn)
    assert not orphans
    assert sorted(expert for experts in plan.values() for expert in experts) == sorted(pairs)
    costs = [sum(EXPERT_COST + pairs[each] for each in plan.get(worker, [])) for worker in workers]
    assert max(costs) - min(costs) <= EXPERT_COST + max(pairs.values())


@given(st.dictionaries(st.integers(0, 20), st.sets(st.sampled_from("abc"))), st.integers(0, 5))
def test_an_expert_goes_to_a_holder_or_is_an_orphan(holders: dict[int, set[str]], turn: int) -> None:
    plan, orphans = assign(dict.fromkeys(holders, 1), {e: tuple(sorted(who)) for e, who in holders.items()}, turn)
    assert orphans == sorted(expert for expert, who in holders.items() if not who)
    for address, experts in plan.items():
        assert all(address in holders[expert] for expert in experts)


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
