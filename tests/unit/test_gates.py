"""Gates: each against how it was published, and the kernels against the pure functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import parallel
from consilium.gate import (
    Routing,
    biased_top_k,
    gshard_top_2,
    limit_groups,
    route,
    softmax_top_k,
    sparse_mixer,
    top_k_softmax,
)
from consilium.gate_rule import GateRule
from gateway.gate import Gate
from gateway.gate_policy import GatePolicy
from tests.unit.model_configs import tiny_config

HIDDEN, EXPERTS = 24, 12

RULES = [
    GateRule(),
    GateRule(normalize=False, scaling=2.5),
    GateRule(scores="top_k_softmax", logit_bias=True),
    GateRule(scores="sigmoid", correction=True, least_sum=1e-20, scaling=1.5),
    GateRule(scores="softmax", correction=True, least_sum=1e-12),
    GateRule(scores="softmax", normalize=False, groups=4, top_groups=2),
    GateRule(scores="sigmoid", correction=True, groups=3, top_groups=2, group_members=2),
    GateRule(scores="sparsemixer", jitter=0.05),
]


class Tensors:
    """As much of a checkpoint as a gate reads."""

    def __init__(self, rule: GateRule, top_k: int, seed: int) -> None:
        self.config = tiny_config(hidden_size=HIDDEN, num_experts=EXPERTS, top_k=top_k, gate=rule)
        self.names: Any = type("Names", (), {"router": "router", "router_bias": "bias", "correction": "correction"})
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            "router": torch.randn(EXPERTS, HIDDEN, generator=generator),
            "bias": torch.randn(EXPERTS, generator=generator),
            "correction": torch.rand(1, EXPERTS, generator=generator),  # as ERNIE 4.5 stores it
        }

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert self.tensors[name].shape == shape
        return self.tensors[name]


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), top_k=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_kernels_compute_the_functions(rule: GateRule, rows: int, top_k: int, seed: int) -> None:
    top_k = 2 if rule.scores == "sparsemixer" else top_k
    source: Any = Tensors(rule, top_k, seed)
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    found = Gate(source, 0).route(x)
    logits = (x.double() @ source.tensors["router"].double().T).float()
    logits += source.tensors["bias"] if rule.logit_bias else 0
    expected = route(logits, source.tensors["correction"][0] if rule.correction else None, rule, top_k)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_does_not_depend_on_the_others(rule: GateRule) -> None:
    source: Any = Tensors(rule, 2, 3)
    gate, x = Gate(source, 0), torch.randn(7, HIDDEN)
    together, alone = gate.route(x), [gate.route(row[None]) for row in x]
    assert torch.equal(together.ids, torch.cat([each.ids for each in alone]))
    assert torch.equal(together.weights, torch.cat([each.weights for each in alone]))


def test_rows_that_are_not_finite_stay_alone() -> None:
    for rule in RULES:
        source: Any = Tensors(rule, 2, 3)
        x = torch.randn(3, HIDDEN)
        expected = Gate(source, 0).route(x)
        x[1] = torch.nan
        found = Gate(source, 0).route(x)
        assert found.weights[1].isnan().all()
        assert found.ids[1].unique().numel() == 2
        assert (found.ids[1] < EXPERTS).all()
        for row in (0, 2):
            assert torch.equal(found.weights[row], expected.weights[row])


def chosen(routing: Routing) -> list[list[int]]:
    found: list[list[int]] = routing.ids.tolist()
    return found


def test_top_k_then_softmax_is_a_normalized_softmax_then_top_k() -> None:
    logits = torch.randn(20, EXPERTS)
    one, other = top_k_softmax(logits, 3), softmax_top_k(logits, 3, normalize=True)
    assert chosen(one) == chosen(other)
    torch.testing.assert_close(one.weights, other.weights)


def test_a_correction_moves_the_choice_and_no_weight() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.4, 0.1]])
    correction = torch.tensor([-1.0, 0.0, 0.0, 0.6])
    found = biased_top_k(scores, correction, 2, normalize=False, scaling=2.0)
    assert chosen(found) == [[1, 3]]
    torch.testing.assert_close(found.weights, torch.tensor([[1.0, 0.2]]))
    found = biased_top_k(torch.zeros(1, 4), correction, 2, normalize=True, least_sum=1e-20)
    assert found.weights.tolist() == [[0, 0]]


def test_only_the_best_groups_take_part() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.2]])
    assert limit_groups(scores, 3, 1, 1).isfinite().tolist() == [[True, True, False, False, False, False]]
    assert limit_groups(scores, 3, 1, 2).isfinite().tolist() == [[False, False, True, True, False, False]]
    assert limit_groups(torch.ones(1, 6), 3, 2, 1).isfinite().tolist() == [[True] * 4 + [False] * 2]


def test_sparse_mixer_weighs_each_among_those_near_it() -> None:
    found = sparse_mixer(torch.tensor([[2.0, 1.99, -1.0, 1.0]]), 0.01)
    assert chosen(found) == [[0, 1]]
    torch.testing.assert_close(found.weights[0, 0], torch.tensor([2.0, 1.99]).softmax(0)[0])
    assert found.weights[0, 1] == 1  # of what is left nothing else is near


def test_gshard_asks_the_second_expert_by_chance() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0]]).repeat(2, 1)
    always = gshard_top_2(logits)
    assert chosen(always) == [[0, 1], [0, 1]]
    torch.testing.assert_close(always.weights.sum(1), torch.ones(2))
    second = always.weights[0, 1].item()
    found = gshard_top_2(logits, torch.tensor([2 * second - 0.01, 2 * second + 0.01]))
    assert found.weights[:, 1].tolist() == [second, 0]
    assert torch.equal(found.weights[:, 0], always.weights[:, 0])


def test_equal_scores_go_to_the_lower_id() -> None:
    for rule in (RULES[0], replace(RULES[3], correction=False), RULES[7]):
        assert chosen(route(torch.zeros(1, EXPERTS), None, rule, 2)) == [[0, 1]]


class Seen(GatePolicy):
    """Keeps what it is given."""

    scores: Tensor | None = None

    def apply(self, routing: Routing, scores: Tensor | None) -> Routing:
        self.scores = scores
        return routing


@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
def test_a_policy_sees_the_scores_of_all_experts(rule: GateRule) -> None:
    source: Any = Tensors(rule, 2, 3)
    policy, x = Seen(source.config, None, 1.5), torch.randn(9, HIDDEN)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(parallel, "count_slices", lambda _: 2)
        Gate(source, 0, policy).route(x)
    logits = x @ source.tensors["router"].T
    assert policy.scores is not None
    torch.testing.assert_close(policy.scores, logits.sigmoid() if rule.scores == "sigmoid" else logits.softmax(-1))
