"""A dispatcher with a cache before it gives what it gives without, and asks only for what is not known.

Letters: T tokens, D hidden size, E experts, K experts per token, P pairs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium.config import CacheConfig
from consilium.errors import ConfigError, ExpertUnavailable
from consilium.gate import softmax_top_k
from consilium.quantization import quantize_rows
from gateway.batches import ExpertBatches, ExpertOutputs, experts_of_tokens, group_by_expert, keep_tokens
from gateway.cache.dispatcher import CachedDispatcher, make_cache
from gateway.cache.memory import ENTRY_OVERHEAD, MemoryCache
from gateway.cache.meter import CacheMeter
from gateway.mailbox import Mailbox
from gateway.placement import ExpertIdentity
from tests.local_workers import outputs_of, rows_of
from tests.unit.model_configs import tiny_config

EXPERTS, TOP_K, HIDDEN = 5, 2, 4
IDENTITIES = {(0, expert): ExpertIdentity(bytes([expert]) * 16, "test/v1") for expert in range(EXPERTS)}

Outcome = tuple[Tensor, dict[int, Exception]]


class Experts:
    """Every expert's output is a function of its id and the row; notes what it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.asked: list[ExpertBatches] = []
        self.failing: set[int] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        self._dtype = dtype

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        assert layer == 0
        assert batches.scales is not None
        self.asked.append(batches)
        self.meanwhile()
        outputs = torch.zeros(batches.places, HIDDEN, dtype=self._dtype)
        failures: dict[int, Exception] = {}
        for position, expert in enumerate(batches.experts.tolist()):
            pairs = np.arange(batches.offsets[position], batches.offsets[position + 1])
            assert len(pairs), "an expert without rows"
            tokens = batches.tokens[pairs]
            if expert in self.failing:
                failures |= dict.fromkeys(tokens.tolist(), ExpertUnavailable("gone"))
                continue
            rows = batches.rows[tokens].float() * batches.scales[tokens][:, None]
            outputs[batches.slots[pairs]] = (rows.sin() * (expert + 1) / 3).to(self._dtype)
        return outputs_of(outputs), failures

    @property
    def rows(self) -> list[int]:
        """Of the last call, each once."""
        return sorted(set(self.asked[-1].tokens.tolist()))


def run(coroutine: Coroutine[Any, Any, tuple[ExpertOutputs, dict[int, Exception]]]) -> Outcome:
    outputs, failures = asyncio.run(coroutine)
    return rows_of(outputs), failures


def batches_of(tokens: list[int], top_k: int = TOP_K) -> ExpertBatches:
    """Rows and routing that depend on the token alone."""
    x, logits = torch.empty(len(tokens), HIDDEN), torch.empty(len(tokens), EXPERTS)
    for row, token in enumerate(tokens):
        generator = torch.Generator().manual_seed(token)
        x[row], logits[row] = torch.randn(HIDDEN, generator=generator), torch.randn(EXPERTS, generator=generator)
    rows, scales = quantize_rows(x)
    return group_by_expert(rows, scales, softmax_top_k(logits, top_k, normalize=True))


def cached(
    experts: Experts, entries: int = 1000, dtype: torch.dtype = torch.float32, top_k: int = TOP_K
) -> CachedDispatcher:
    memory = MemoryCache(entries * (ENTRY_OVERHEAD + top_k * HIDDEN * dtype.itemsize), dtype, top_k, HIDDEN)
    dispatcher = CachedDispatcher(experts, memory, None, CacheMeter(), dtype, "")
    dispatcher.set_identities(IDENTITIES)
    return dispatcher


STEPS = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=8)


@settings(deadline=None)
@given(STEPS, st.integers(1, EXPERTS), st.sampled_from([0, 1, 5, 1000]), st.sampled_from(["float32", "bfloat16"]))
def test_the_same_bits_as_without(steps: list[list[int]], top_k: int, entries: int, dtype_name: str) -> None:
    dtype: torch.dtype = getattr(torch, dtype_name)
    experts = Experts(dtype)
    dispatcher = cached(experts, entries, dtype, top_k)
    for tokens in steps:
        batches = batches_of(tokens, top_k)
        expected, _ = run(Experts(dtype).dispatch(0, batches))
        found, failures = run(dispatcher.dispatch(0, batches))
        assert torch.equal(found, expected)
        assert not failures


def test_what_is_known_is_not_asked_for() -> None:
    experts = Experts()
    dispatcher = cached(experts)
    run(dispatcher.dispatch(0, batches_of([1, 2])))
    assert experts.rows == [0, 1]
    run(dispatcher.dispatch(0, batches_of([2, 3, 1])))
    assert experts.rows == [1]  # token 3, and nothing of the others
    run(dispatcher.dispatch(0, batches_of([1, 1, 3])))
    assert len(experts.asked) == 2  # it was not asked at all
    stats = dispatcher.take_report()
    assert stats is not None
    assert (stats.tiers["memory"].hits, stats.tiers["memory"].misses, stats.entries) == (5, 3, 3)


@given(STEPS, st.data())
def test_keeping_tokens_changes_nothing_about_them(steps: list[list[int]], data: st.DataObject) -> None:
    batches = batches_of(steps[0])
    kept = data.draw(st.lists(st.integers(0, len(steps[0]) - 1), unique=True))
    reduced = keep_tokens(batches, kept)
    assert reduced.places == batches.places
    assert (np.diff(reduced.offsets) > 0).all()

    def pairs(of: ExpertBatches) -> list[tuple[int, int, int]]:
        owners = np.repeat(of.experts, np.diff(of.offsets))
        return list(zip(owners.tolist(), of.slots.tolist(), of.tokens.tolist(), strict=True))

    assert pairs(reduced) == [(expert, slot, token) for expert, slot, token in pairs(batches) if token in kept]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, EXPERTS))
def test_the_experts_of_tokens_are_those_of_the_routing(tokens: list[int], top_k: int) -> None:
    logits = torch.randn(len(tokens), EXPERTS, generator=torch.Generator().manual_seed(sum(tokens)))
    routing = softmax_top_k(logits, top_k, normalize=True)
    batches = group_by_expert(torch.zeros(len(tokens), 1), None, routing)
    assert experts_of_tokens(batches).tolist() == routing.ids.tolist()


def test_failed_rows_are_not_kept() -> None:
    experts = Experts()
    dispatcher = cached(experts)
    batches = batches_of(list(range(12)))
    experts.failing = {2}
    _, failures = run(dispatcher.dispatch(0, batches))
    assert 0 < len(failures) < 12
    experts.failing = set()
    found, failures = run(dispatcher.dispatch(0, batches))
    expected, _ = run(Experts().dispatch(0, batches))
    assert not failures
    assert torch.equal(found, expected)


def test_other_weights_are_other_rows() -> None:
    experts = Experts()
    dispatcher = cached(experts)
    batches = batches_of([1])
    run(dispatcher.dispatch(0, batches))
    first = int(batches.experts[0])
    dispatcher.set_identities({**IDENTITIES, (0, first): ExpertIdentity(b"other weights...", "test/v1")})
    run(dispatcher.dispatch(0, batches))
    assert experts.rows == [0]


def test_rows_computed_while_weights_change_are_not_kept() -> None:
    experts = Experts()
    dispatcher = cached(experts)
    other = {each: identity._replace(weights=b"other weights...") for each, identity in IDENTITIES.items()}

    def swap_and_back() -> None:
        dispatcher.set_identities(other)
        dispatcher.set_identities(IDENTITIES)

    experts.meanwhile = swap_and_back
    run(dispatcher.dispatch(0, batches_of([1])))
    experts.meanwhile = lambda: None
    run(dispatcher.dispatch(0, batches_of([1])))
    assert experts.rows == [0]


def test_experts_without_one_identity_are_asked_every_time() -> None:
    experts = Experts()
    dispatcher = cached(experts)
    batches = batches_of(list(range(8)))
    odd = 2
    dispatcher.set_identities({each: identity for each, identity in IDENTITIES.items() if each[1] != odd})
    for _ in range(2):
        run(dispatcher.dispatch(0, batches))
    assert experts.rows == [row for row, ids in enumerate(experts_of_tokens(batches)) if odd in ids]
    assert 0 < len(experts.rows) < 8


def test_only_int8_rows_have_keys() -> None:
    x = torch.randn(2, HIDDEN)
    batches = group_by_expert(x, None, softmax_top_k(torch.randn(2, EXPERTS), TOP_K, normalize=True))
    with pytest.raises(TypeError, match="int8"):
        run(cached(Experts()).dispatch(0, batches))


def test_a_cache_that_keeps_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="keeps nothing"):
        make_cache(CacheConfig(memory=0), Experts(), torch.float32, tiny_config(), Mailbox(lambda _: None))
