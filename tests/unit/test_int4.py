from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import parallel
from consilium.config import Config, WorkerConfig
from consilium.errors import CheckpointError, ConfigError, ConsiliumError
from consilium.experts import compute_expert
from consilium.int4 import Int4, Int4Rows, interleave, round_int4
from consilium.int4_experts import GroupedProduct, Int4Arithmetic, prepare_int4
from consilium.int4_proof import define_product, find_grouped_product, find_mistake
from consilium.kernels import int4_tile, int8_tile
from consilium.kernels.int8_tile import PORTABLE, Kind
from consilium.kernels.rounding import STEPS
from consilium.quantization import Quantized, quantize_rows, quantize_weight
from consilium.silu import exp
from expert_service.device import find_device
from tests.unit.model_configs import tiny_config
from tests.unit.test_experts import HIDDEN, SIZE, expert

KINDS = int8_tile.candidates()
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: int8_tile.NAMES[kind])
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 260))  # rows, outputs, words of inputs


def random_weight(outputs: int, words: int, group: int, generator: torch.Generator) -> Int4Rows:
    packed = torch.randint(-(2**31), 2**31, (outputs, words), generator=generator).to(torch.int32)
    return Int4Rows(packed, torch.randn(outputs, -(-words * 8 // group), generator=generator), group)


@kinds
@settings(max_examples=60, deadline=None)
@given(size=SIZES, group=st.sampled_from([8, 32, 64, 128, 256]), seed=st.integers(0, 2**31))
def test_the_kernel_is_the_definition_to_the_last_bit(
    kind: Kind, size: tuple[int, int, int], group: int, seed: int
) -> None:
    rows, outputs, words = size
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(outputs, words, group, generator)
    values = torch.randint(-128, 128, (rows, 8 * words), generator=generator).to(torch.int8)
    x = Quantized(values, torch.rand(rows, generator=generator))
    assert torch.equal(GroupedProduct(kind).multiply(x, interleave(weight)), define_product(x, weight))


def test_the_definition_is_close_to_the_product_in_float64() -> None:
    weight = random_weight(40, 90, 64, torch.Generator().manual_seed(3))
    x = quantize_rows(torch.randn(9, 720, generator=torch.Generator().manual_seed(4)))
    expected = (x.values.double() * x.scales.double()[:, None]) @ weight.floats().double().T
    error = (define_product(x, weight).double() - expected).norm() / expected.norm()
    assert error < 1e-6


@kinds
def test_threads_share_a_product(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(300, 40, 64, torch.Generator().manual_seed(5))
    x = quantize_rows(torch.randn(70, 320))
    alone = GroupedProduct(kind).multiply(x, interleave(weight))
    monkeypatch.setattr(parallel, "count_slices", lambda _: 2)
    assert torch.equal(GroupedProduct(kind).multiply(x, interleave(weight)), alone)


def test_an_expert_is_the_definition_step_by_step() -> None:
    tensors, x = expert(2), torch.randn(5, HIDDEN) * 3
    gate_weight, up_weight, down_weight = map(round_int4, tensors.floats())
    rows = quantize_rows(x)
    gate, up = define_product(rows, gate_weight), define_product(rows, up_weight)
    expected = define_product(quantize_rows(gate / (exp(-gate) + 1) * up), down_weight)
    arithmetic = Int4Arithmetic(torch.float32, find_grouped_product())
    assert torch.equal(compute_expert(arithmetic, arithmetic.prepare(tensors), *rows), expected)


def test_rounding_takes_the_scale_with_the_least_error() -> None:
    w = torch.randn(13, 200, generator=torch.Generator().manual_seed(6))
    found = round_int4(w, 64)
    assert found.scales.shape == (13, 4)
    assert torch.equal(found.scales, found.scales.bfloat16().float())

    def error(rounded: Tensor) -> Tensor:
        squares = torch.nn.functional.pad((rounded - w) ** 2, (0, 56))
        return torch.stack([each.sum(1) for each in squares.split(64, 1)], 1)

    largest = torch.nn.functional.pad(w, (0, 56)).unflatten(1, (4, 64)).abs().amax(2)
    tried = []
    for steps in STEPS:
        scales = (largest / float(steps)).bfloat16().float().repeat_interleave(64, 1)[:, :200]
        tried.append(error((w / scales).round().clamp(-8, 7) * scales))
    assert torch.allclose(error(found.floats()), torch.stack(tried).amin(0), rtol=1e-3)
    assert (error(found.floats()) < tried[0] * 1.001).all()


def test_what_is_int4_already_is_rounded_to_itself() -> None:
    weight = random_weight(20, 16, 64, torch.Generator().manual_seed(7))
    weight.packed[:, ::8] = torch.tensor(0x77777770)  # -8 and -1: the scale with the largest magnitude / 8 is exact
    exact = weight._replace(scales=weight.scales.abs().bfloat16().float())
    again = round_int4(exact.floats(), 64)
    assert torch.equal(again.floats(), exact.floats())


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_groups_that_are_nothing(value: float) -> None:
    found = round_int4(torch.full((2, 16), value))
    assert found.scales.eq(0).all()
    assert found.floats().eq(0).all()


def test_int8_on_disk_is_rounded_again() -> None:
    w = torch.randn(16, 64)
    quantized = quantize_weight(w)
    floats = quantized.values.float() * quantized.scales[:, None]
    assert torch.equal(prepare_int4(quantized).values, prepare_int4(floats).values)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="rows of 12 weights are no multiple of 8, as int4 needs it; use int8"):
        round_int4(torch.randn(4, 12))


class Wrong(GroupedProduct):
    def multiply(self, x: Quantized, w: Int4) -> Tensor:
        found = GroupedProduct.multiply(self, x, w)
        found[-1, -1] += 1e-3
        return found


def test_a_wrong_kernel_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_mistake(Wrong(PORTABLE), [(16, 64, 32)]) == (
        "wrong numbers for 1 rows and a weight of [16, 64] in groups of 32"
    )
    monkeypatch.setattr("consilium.int4_proof.GroupedProduct", Wrong)
    with pytest.raises(ConsiliumError, match="no int4 kernel is exact on this CPU"):
        find_grouped_product([(SIZE, HIDDEN)])


def test_the_order_of_a_word() -> None:
    """As consilium.kernels.int4_tile says, number by number."""
    packed = torch.tensor([[0x76543210]], dtype=torch.int32)
    found = interleave(Int4Rows(packed, torch.ones(1, 1), 8))
    assert found.values.shape == (1, 1, int4_tile.CHANNELS)
    assert found.values[0, 0, 0].item() == 0x73625140
    assert found.values[0, 0, 1:].eq(0).all()
    assert found.scales[0, 0].tolist() == [1.0] + [0.0] * 15


def test_a_gpu_is_not_asked_for_int4(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = Config(quantization="int4", worker=WorkerConfig(device="cuda"))
    with pytest.raises(ConfigError, match="GPUs do not compute int4 yet; choose --device cpu, or --quantization int8"):
        find_device(config, tiny_config())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(quantization="int4", worker=WorkerConfig(device="auto"))
    assert find_device(config, tiny_config()).name == "cpu"
    assert "computing on the CPU although there is a GPU" in caplog.text
