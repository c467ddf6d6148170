"""The promise (ARCHITECTURE.md, "The same bits"): a request's tokens and logprobs depend on nothing around it.

Every case runs some requests together in one engine with odd circumstances, and each request alone in a plain one.
`make test` runs a few cases, `make exact` ten thousand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from consilium import parallel
from consilium.arithmetics import DTYPES
from consilium.checkpoint import Checkpoint
from consilium.config import RowDType
from consilium.errors import ExpertUnavailable
from consilium.frames import Frame
from consilium.integer_product import find_integer_product
from gateway.arithmetic import Arithmetic
from gateway.kv_cache import blocks_for
from gateway.messages import Generate, SamplingParams
from tests.local_workers import IntegerRows
from tests.tiny_models import (
    save_deepseek,
    save_deepseek_v2,
    save_deepseek_v3,
    save_ernie4_5_moe,
    save_glm4_moe,
    save_gpt_oss,
    save_granitemoe,
    save_minimax_m2,
    save_mixtral,
    save_olmoe,
    save_phimoe,
    save_qwen2_moe,
    save_qwen3_moe,
)
from tests.unit.served_engine import Served, Story, prompt

CASES = int(os.environ.get("EXACT_CASES", "40"))
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # explaining a failure takes minutes
NEVER = 10**9
LONGEST = 360  # tokens of a prompt

# Odd sizes: heads of 24, which are no whole vectors; a hidden size that is no multiple of 64; 5 experts; a window.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (save_mixtral, {"hidden_size": 72, "num_local_experts": 5, "sliding_window": 20}),
    "qwen3_moe": (save_qwen3_moe, {"mlp_only_layers": [1]}),
    # The following go other ways through attention, gate or experts: a few cases each.
    "olmoe": (save_olmoe, {"clip_qkv": 1.5}),
    "qwen2_moe": (save_qwen2_moe, {}),
    "deepseek": (save_deepseek, {}),
    "deepseek_v2": (save_deepseek_v2, {"q_lora_rank": None}),
    "deepseek_v3": (save_deepseek_v3, {}),
    "gpt_oss": (save_gpt_oss, {}),
    "granitemoe": (save_granitemoe, {}),
    "phimoe": (save_phimoe, {}),
    "ernie4_5_moe": (save_ernie4_5_moe, {}),
    "glm4_moe": (save_glm4_moe, {}),
    "minimax_m2": (save_minimax_m2, {}),
    "mixtral in int4": (save_mixtral, {"hidden_size": 72, "num_local_experts": 5, "intermediate_size": 200}),
    "gpt_oss in int4": (save_gpt_oss, {}),
}

Request = tuple[int, int, int, float]  # seed, tokens of the prompt, new tokens, temperature


@dataclass(frozen=True)
class Circumstances:
    """Everything that must not matter."""

    arrivals: tuple[int, ...]  # the step before which each request comes
    experts: tuple[tuple[int, ...], ...]  # of each worker; some are held by several
    fails_after: int  # frames, after which the first worker answers no more; the others hold its experts, too
    step: int  # most tokens in a step: the largest chunk of a prompt
    blocks: int  # of keys and values; few force somebody to give way
    prefix_cache: bool
    warm: bool  # the same requests have run before
    threads: int
    micro_batches: int


@cache
def tiny(family: str) -> Checkpoint:
    folder = Path(mkdtemp(prefix="consilium-exact-"))
    save, overrides = FAMILIES[family]
    return Checkpoint(save(folder, num_hidden_layers=2, **overrides))


@cache
def arithmetic(dtype: RowDType) -> Arithmetic:
    product = find_integer_product()
    return Arithmetic(DTYPES[dtype], product, product)


@cache
def integer_rows(family: str) -> IntegerRows:
    return IntegerRows(tiny(family), "int4" if family.endswith("int4") else "int8")


def serve(
    family: str,
    dtype: RowDType,
    blocks: int,
    step: int,
    experts: Iterable[Iterable[int]],
    *,
    prefix_cache: bool,
    micro_batches: int = 1,
) -> Served:
    """An engine in int8, or with experts in int4, whose keys and values have the dtype."""
    computed, rows = arithmetic(dtype), integer_rows(family)
    return Served(
        tiny(family),
        blocks,
        step,
        experts,
        prefix_cache=prefix_cache,
        micro_batches=micro_batches,
        arithmetic=computed,
        compute=rows,
    )


@cache
def alone(family: str, dtype: RowDType, request: Request) -> Story:
    """The story of a request that has a plain engine to itself."""
    served = serve(family, dtype, 100, 512, [range(tiny(family).config.num_experts)], prefix_cache=False)
    return served.run(generate(0, request))[0]


def generate(number: int, request: Request) -> Generate:
    """Prompts of the same seed begin with the same tokens."""
    seed, length, new, temperature = request
    sampling = SamplingParams(
        new, temperature=temperature, seed=seed, ignore_eos=True, logprobs=2, prompt_logprobs=1 if seed == 2 else None
    )
    return Generate(number, prompt(LONGEST, seed)[:length], sampling)


lengths = st.sampled_from([*range(1, 90), *range(200, LONGEST, 13)])
requests = st.lists(
    st.tuples(st.integers(0, 4), lengths, st.integers(1, 9), st.sampled_from([0.0, 0.0, 0.9])),
    min_size=1,
    max_size=6,
)


@st.composite
def circumstances(draw: st.DrawFn, asked: list[Request], experts: int) -> Circumstances:
    least = max(blocks_for(length + new) for _, length, new, _ in asked)
    workers = draw(st.integers(1, 4))
    holders = [draw(st.sets(st.integers(0, workers - 1), min_size=1)) for _ in range(experts)]
    fails_after = NEVER
    if all(mine - {0} for mine in holders):
        fails_after = draw(st.sampled_from([NEVER, 0, 3, 10]))
    return Circumstances(
        arrivals=tuple(draw(st.integers(0, 8)) for _ in asked),
        experts=tuple(tuple(each for each in range(experts) if worker in holders[each]) for worker in range(workers)),
        fails_after=fails_after,
        step=draw(st.sampled_from([1, 2, 3, 7, 16, 33, 64, 512])),
        blocks=least + draw(st.sampled_from([0, 2, 7, 100])),
        prefix_cache=draw(st.booleans()),
        warm=draw(st.booleans()),
        threads=draw(st.integers(1, 2)),
        micro_batches=draw(st.integers(1, 2)),
    )


@pytest.fixture(autouse=True)
def slices_for_little_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels use a second thread even for these small weights."""
    monkeypatch.setattr(parallel, "WORTH", 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    parallel.run([lambda: None])  # the pool, as large as it will get
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", list(FAMILIES)[:2])
@settings(max_examples=CASES // 4, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(data=st.data(), asked=requests)
def test_the_same_bits_whatever_else_happens(
    family: str, dtype: RowDType, data: st.DataObject, asked: list[Request]
) -> None:
    check(family, dtype, data, asked)


@pytest.mark.parametrize("family", list(FAMILIES)[2:])
@settings(max_examples=max(3, CASES // 40), deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(data=st.data(), asked=requests)
def test_the_same_bits_in_other_families(family: str, data: st.DataObject, asked: list[Request]) -> None:
    check(family, "bfloat16", data, asked)


def check(family: str, dtype: RowDType, data: st.DataObject, asked: list[Request]) -> None:
    around = data.draw(circumstances(asked, tiny(family).config.num_experts))
    torch.set_num_threads(1)
    expected = [alone(family, dtype, request) for request in asked]
    torch.set_num_threads(around.threads)
    served = run(family, dtype, asked, around)
    for number, story in enumerate(expected):
        found = served.stories[number]
        assert found.failure is None
        assert replace(found, queue_seconds=[]) == replace(story, queue_seconds=[])  # every float to the last bit
    event(f"preempted: {any(each.preemptions for each in served.stats)}")
    event(f"prefix reused: {any(each.prefix_hits for each in served.stats)}")
    event(f"two batches: {any(each.micro_batches == 2 for each in served.stats)}")
    event(f"a worker failed: {any(stats.failures for each in served.stats for stats in each.workers)}")


def run(family: str, dtype: RowDType, asked: list[Request], around: Circumstances) -> Served:
    """All requests in one engine, each when its time has come."""
    served = serve(
        family,
        dtype,
        around.blocks,
        around.step,
        around.experts,
        prefix_cache=around.prefix_cache,
        micro_batches=around.micro_batches,
    )
    if around.warm:
        served.run(*(generate(number, request) for number, request in enumerate(asked, 100)))
    first = served.workers[0]
    limit = len(first.frames) + around.fails_after

    def fail(frame: Frame) -> Exception | None:  # noqa: ARG001 (the worker's)
        return ExpertUnavailable("killed") if len(first.frames) > limit else None

    first.misbehave = fail
    for step in range(max(around.arrivals) + 1):
        served.add(*(generate(n, request) for n, request in enumerate(asked) if around.arrivals[n] == step))
        if served.engine.has_work:
            served.step()
    served.run()
    assert all(len(served.stories[number].tokens) == request[2] for number, request in enumerate(asked))
    return served
