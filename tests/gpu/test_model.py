"""A model on a device behind the engine: near the CPU's, and the same bits whatever is around a request."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from consilium.checkpoint import Checkpoint
from consilium.integer_product import find_integer_product
from gateway.arithmetic import Arithmetic
from gateway.dispatcher import Dispatcher
from gateway.engine_model import EngineModel
from gateway.gate_policy import GatePolicy
from gateway.gpu import model as device_model
from gateway.gpu.experts import DispatchedExperts, ExpertHalf, load_experts
from gateway.gpu.model import DeviceModel
from gateway.gpu.pages import PAGE, PagePool
from gateway.gpu.tiling import Tiling
from gateway.kv_cache import Pool
from gateway.messages import Generate, SamplingParams
from tests.local_workers import IntegerRows
from tests.tiny_models import save_mixtral, save_olmoe, save_qwen3_moe
from tests.unit.served_engine import Served, Story, assert_same_story, greedy, prompt

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILING = Tiling(rows=16, keys=16, chunk=16)  # several tiles and chunks even for short texts
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}

FAMILIES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "qwen3_moe": (save_qwen3_moe, {"num_experts": 4, "mlp_only_layers": [1]}),
    "mixtral": (save_mixtral, {"sliding_window": 11}),
    "olmoe": (save_olmoe, {"clip_qkv": 1.5, "num_experts": 4}),
    "one layer": (save_qwen3_moe, {"num_experts": 4, "num_hidden_layers": 1}),  # for what takes long
}


@cache
def tiny(family: str) -> Checkpoint:
    save, overrides = FAMILIES[family]
    return Checkpoint(save(Path(mkdtemp(prefix="consilium-gpu-")), **{**SMALL, **overrides}))


@cache
def int8_rows(family: str) -> IntegerRows:
    return IntegerRows(tiny(family))


@cache
def arithmetic(dtype: torch.dtype) -> Arithmetic:
    product = find_integer_product()
    return Arithmetic(dtype, product, product)


class ServedByDevice(Served):
    """The engine over a model on the device."""

    def model_of(
        self,
        checkpoint: Checkpoint,
        arithmetic: Arithmetic,
        dispatcher: Dispatcher,
        policy: GatePolicy | None,
        memory: int,
    ) -> tuple[EngineModel, Pool]:
        del policy
        nobodys = checkpoint.config.cached_elements * arithmetic.dtype.itemsize * PAGE
        experts = self.experts_of(checkpoint, dispatcher)

        def make_pool() -> PagePool:
            return PagePool(checkpoint.config, arithmetic.dtype, memory + nobodys, DEVICE)

        how = DEVICE, dispatcher.clock
        model = DeviceModel(checkpoint, experts, make_pool, (TILING, TILING), *how, meter=dispatcher.meter)
        return model, model.pool

    def experts_of(self, checkpoint: Checkpoint, dispatcher: Dispatcher) -> ExpertHalf:
        """Workers', reached by the dispatcher."""
        del checkpoint
        return DispatchedExperts(dispatcher, dispatcher.clock)


class ServedWithoutWorkers(ServedByDevice):
    """All experts are on the device."""

    def experts_of(self, checkpoint: Checkpoint, dispatcher: Dispatcher) -> ExpertHalf:
        del dispatcher
        return load_experts(checkpoint, DEVICE)


def serve(
    kind: type[Served],
    family: str,
    dtype: torch.dtype,
    blocks: int = 100,
    step: int = 64,
    *,
    prefix_cache: bool = False,
) -> Served:
    """In int8, keys and values of ``dtype``, with two workers."""
    how, compute = arithmetic(dtype), int8_rows(family)
    with torch.inference_mode():
        return kind(tiny(family), blocks, step, prefix_cache=prefix_cache, arithmetic=how, compute=compute)


@pytest.mark.parametrize("family", list(FAMILIES)[:3])
def test_logprobs_are_near_those_of_the_cpu(family: str) -> None:
    asked = greedy(1, prompt(18, 1), 2, logprobs=2, prompt_logprobs=1)
    found, expected = (serve(kind, family, torch.float32).run(asked)[1] for kind in (ServedByDevice, Served))
    pairs = zip(found.prompt_logprobs + found.logprobs, expected.prompt_logprobs + expected.logprobs, strict=True)
    differences = torch.tensor([each.logprob - other.logprob for each, other in pairs])
    # But for the order of sums they compute the same; an int8 row may be rounded to another level for it.
    assert differences.abs().mean() < 1e-4
    assert differences.abs().max() < 1e-2
    assert found.tokens == expected.tokens


def test_the_same_bits_whatever_else_happens() -> None:
    """Alone; in small steps, with others that begin alike, where somebody has to give way."""
    family = "one layer"
    asked = [
        greedy(0, prompt(30, 1)[:15], 4, logprobs=2),
        Generate(1, prompt(30, 1), SamplingParams(4, temperature=0.9, seed=7, ignore_eos=True, logprobs=2)),
        greedy(2, prompt(12, 2), 6, logprobs=1, prompt_logprobs=1),
    ]
    alone: list[Story] = [serve(ServedByDevice, family, torch.bfloat16).run(each)[each.id] for each in asked[:2]]
    together = serve(ServedByDevice, family, torch.bfloat16, blocks=5, step=20, prefix_cache=True)
    together.run(greedy(10, prompt(30, 1)[:20], 1))  # so that there is a prefix to reuse
    stories = together.run(*asked)
    for each, story in zip(asked[:2], alone, strict=True):
        assert_same_story(stories[each.id], story)
    assert any(each.preemptions for each in together.stats)
    assert any(each.prefix_hits for each in together.stats)


def test_experts_on_the_device_have_the_bits_of_workers_and_as_many_rows() -> None:
    asked = greedy(1, prompt(12, 3), 2, logprobs=2, prompt_logprobs=1)
    kinds = (ServedByDevice, ServedWithoutWorkers)
    dispatched, own = (serve(kind, "one layer", torch.bfloat16) for kind in kinds)
    assert_same_story(own.run(asked)[1], dispatched.run(asked)[1])
    load = own.meter.take_report()
    assert load is not None
    assert load == dispatched.meter.take_report()


def test_warming_up_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_model, "WARM_ROWS", (1, 2))
    served = serve(ServedWithoutWorkers, "one layer", torch.bfloat16, blocks=2)
    model = served.engine.model
    assert isinstance(model, DeviceModel)
    with torch.inference_mode():
        model.warm_up()
    assert model.pool.free_blocks == model.pool.total_blocks == 2


class FirstLaunches:
    """As CUDA graphs: whatever is launched under a key is what was launched first, on the tensors that it had."""

    enabled = True

    def __init__(self) -> None:
        self._first: dict[Hashable, Callable[[], Any]] = {}

    def run(self, key: Hashable, launch: Callable[[], Any]) -> Any:
        return self._first.setdefault(key, launch)()


@pytest.mark.parametrize("kind", [ServedByDevice, ServedWithoutWorkers])
def test_steps_of_one_shape_may_be_launched_as_the_first_one_was(kind: type[Served]) -> None:
    asked = [greedy(0, prompt(5, 1), 4, logprobs=1), greedy(1, prompt(3, 2), 3, logprobs=1)]
    plain, replayed = (serve(kind, "one layer", torch.bfloat16) for _ in range(2))
    assert isinstance(replayed.engine.model, DeviceModel)
    replayed.engine.model._graphs = FirstLaunches()  # type: ignore[assignment]  # has what is used of them
    expected, found = plain.run(*asked), replayed.run(*asked)
    for each in asked:
        assert_same_story(found[each.id], expected[each.id])
