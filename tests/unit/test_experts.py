from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from consilium.arithmetics import DTYPES, find_arithmetic
from consilium.checkpoint import ExpertBiases, ExpertTensors
from consilium.config import Quantization, RowDType
from consilium.errors import CheckpointError
from consilium.experts import Arithmetic, compute_expert
from consilium.float_experts import tiled_linear
from consilium.model_config import ClampedSwiGLU
from consilium.quantization import quantize_rows, quantize_weight
from consilium.silu import exp
from expert_service.sources import blank_weights, chunks, read_weights
from tests.local_workers import reference_row
from tests.unit.model_configs import tiny_config

HIDDEN, SIZE = 72, 40
MODES: list[tuple[Quantization, RowDType]] = [
    ("none", "float32"),
    ("none", "bfloat16"),
    ("int8", "float32"),
    ("int8", "bfloat16"),
    ("int8-weight-only", "float32"),
    ("int8-weight-only", "bfloat16"),
    ("int4", "float32"),
    ("int4", "bfloat16"),
]
# Of norms, against float64.
ERRORS = {"none-float32": 1e-6, "none-bfloat16": 1e-2, "int4-float32": 0.2, "int4-bfloat16": 0.2}
modes = pytest.mark.parametrize(("quantization", "dtype"), MODES)


def expert(seed: int, dtype: torch.dtype = torch.float32) -> ExpertTensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((SIZE, HIDDEN), (SIZE, HIDDEN), (HIDDEN, SIZE))
    gate, up, down = ((torch.randn(shape, generator=generator) / 6).to(dtype) for shape in shapes)
    return ExpertTensors(gate, up, down)


def biased_expert(seed: int) -> ExpertTensors:
    """As gpt-oss has it: biases, and an activation that is clamped."""
    generator = torch.Generator().manual_seed(seed + 1000)
    biases = ExpertBiases(*(torch.randn(size, generator=generator) for size in (SIZE, SIZE, HIDDEN)))
    return expert(seed)._replace(biases=biases, activation=ClampedSwiGLU(1.7, 0.8))


def inputs(arithmetic: Arithmetic, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token rows as the gateway would send them."""
    return quantize_rows(x) if arithmetic.row_dtype is torch.int8 else (x.to(arithmetic.row_dtype), None)


def reference(tensors: ExpertTensors, x: Tensor) -> Tensor:
    gate, up, down = (tensor.double() for tensor in tensors.floats())
    return (functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T


def bits(rows: Tensor) -> Tensor:
    return rows.view(torch.int16 if rows.dtype is torch.bfloat16 else torch.int32)


@modes
def test_close_to_the_reference(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    tensors, x = expert(1), torch.randn(9, HIDDEN)
    found = compute_expert(arithmetic, arithmetic.prepare(tensors), *inputs(arithmetic, x))
    assert found.dtype == arithmetic.reply_dtype == getattr(torch, dtype)
    expected = reference(tensors, x)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < ERRORS.get(f"{quantization}-{dtype}", 3e-2)


def test_int8_is_the_definition_step_by_step() -> None:
    arithmetic = find_arithmetic("int8", "float32", HIDDEN, SIZE)
    tensors, x = expert(2), torch.randn(5, HIDDEN) * 3

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        (a, scale_a), (b, scale_b) = quantize_rows(rows), quantize_rows(weight)
        return ((a.long() @ b.long().T).float() * scale_a[:, None]) * scale_b

    gate_weight, up_weight, down_weight = tensors.floats()
    gate, up = product(x, gate_weight), product(x, up_weight)
    activated = gate / (exp(-gate) + 1) * up
    found = compute_expert(arithmetic, arithmetic.prepare(tensors), *quantize_rows(x))
    assert torch.equal(found, product(activated, down_weight))
    rounded = find_arithmetic("int8", "bfloat16", HIDDEN, SIZE)
    assert torch.equal(compute_expert(rounded, rounded.prepare(tensors), *quantize_rows(x)), found.bfloat16())


@modes
def test_a_row_has_the_same_bits_in_any_batch(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    weights = arithmetic.prepare(expert(3))
    rows, scales = inputs(arithmetic, torch.randn(70, HIDDEN))
    together = compute_expert(arithmetic, weights, rows, scales)
    order = torch.randperm(70)
    for chosen in (order, *order.split([1, 2, 3, 5, 16, 31, 12])):
        found = compute_expert(arithmetic, weights, rows[chosen], None if scales is None else scales[chosen])
        assert torch.equal(bits(found), bits(together[chosen]))


@modes
def test_several_experts_at_once(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    experts = [arithmetic.prepare(expert(seed)) for seed in range(4)]
    rows, scales = inputs(arithmetic, torch.randn(12, HIDDEN))
    offsets: Sequence[int] = [0, 5, 5, 11, 12]  # the second has no rows
    found = arithmetic.compute(experts, offsets, rows, scales)
    for weights, start, end in zip(experts, offsets, offsets[1:], strict=False):
        if start < end:
            alone = compute_expert(arithmetic, weights, rows[start:end], None if scales is None else scales[start:end])
            assert torch.equal(bits(found[start:end]), bits(alone))


@modes
def test_a_bad_row_harms_no_other(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    weights = arithmetic.prepare(expert(4))
    x = torch.randn(4, HIDDEN)
    clean = compute_expert(arithmetic, weights, *inputs(arithmetic, x))
    x[1], x[2, 7] = torch.inf, torch.nan
    found = compute_expert(arithmetic, weights, *inputs(arithmetic, x))
    assert found[1:3].isnan().all()
    assert torch.equal(bits(found[[0, 3]]), bits(clean[[0, 3]]))


@modes
def test_weights_are_copied(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    tensors = expert(5, arithmetic.reply_dtype)
    weights = arithmetic.prepare(tensors)
    before = weights.content_hash()
    for tensor in tensors.floats():
        tensor.zero_()
    assert weights.content_hash() == before


@modes
def test_the_content_hash_tells_weights_apart(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    first = arithmetic.prepare(expert(6)).content_hash()
    assert len(first) == 16
    assert arithmetic.prepare(expert(6)).content_hash() == first
    hashes = {first}
    for changed in range(3):
        tensors = expert(6)
        tensors.floats()[changed][1, 2] += 1
        hashes.add(arithmetic.prepare(tensors).content_hash())
    assert len(hashes) == 4


def test_the_content_hash_covers_dtype_and_shape() -> None:
    zeros = ExpertTensors(torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(6, 4))
    other_shape = ExpertTensors(torch.zeros(6, 4), torch.zeros(6, 4), torch.zeros(4, 6))
    arithmetics = [find_arithmetic("none", dtype, 4, 6) for dtype in DTYPES]
    hashes = {each.prepare(tensors).content_hash() for each in arithmetics for tensors in (zeros, other_shape)}
    assert len(hashes) == 4


def test_numerics_classes() -> None:
    classes = [find_arithmetic(quantization, dtype, 8, 16).numerics_class for quantization, dtype in MODES]
    assert classes[2] == classes[3] == "int8/v1"
    assert classes[0].startswith("float32/cpu/")
    assert classes[1].startswith("bfloat16/cpu/")
    assert classes[4].startswith("int8-weight-only-float32/cpu/")
    assert classes[6] == classes[7] == "int4/v1"
    assert len(set(classes)) == 6


def test_weight_only_rounds_the_weights_and_nothing_else() -> None:
    arithmetic = find_arithmetic("int8-weight-only", "float32", HIDDEN, SIZE)
    tensors, x = expert(7), torch.randn(5, HIDDEN)
    gate, up, down = (values.float() * scales[:, None] for values, scales in map(quantize_weight, tensors.floats()))
    found = compute_expert(arithmetic, arithmetic.prepare(tensors), x)
    expected = reference(ExpertTensors(gate, up, down), x)
    assert (found.double() - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("quantization", ["int8", "int8-weight-only"])
def test_weights_that_are_int8_on_disk_are_taken_as_they_are(quantization: Quantization) -> None:
    arithmetic, tensors = find_arithmetic(quantization, "float32", HIDDEN, SIZE), expert(8)
    gate, up, down = map(quantize_weight, tensors.floats())
    on_disk = ExpertTensors(gate, up, down)
    assert arithmetic.prepare(on_disk).content_hash() == arithmetic.prepare(tensors).content_hash()
    with pytest.raises(CheckpointError, match="int8 on disk"):
        find_arithmetic("none", "float32", HIDDEN, SIZE).prepare(on_disk)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64])
def test_tiles_cover_every_row(count: int) -> None:
    x, weight = torch.randn(count, 20), torch.randn(7, 20)
    assert torch.allclose(tiled_linear(x, weight), x @ weight.T, atol=1e-5)


@modes
def test_biases_and_a_clamped_activation(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    tensors, x = biased_expert(9), torch.randn(5, HIDDEN)
    found = compute_expert(arithmetic, arithmetic.prepare(tensors), *inputs(arithmetic, x)).double()
    expected = torch.cat([reference_row(tensors, row) for row in x.split(1)]).double()
    error = (found - expected).norm() / expected.norm()
    assert error < ERRORS.get(f"{quantization}-{dtype}", 3e-2)


@modes
def test_a_biased_expert_beside_others_has_the_same_bits(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    experts = [arithmetic.prepare(each) for each in (expert(1), biased_expert(2), expert(3))]
    rows, scales = inputs(arithmetic, torch.randn(80, HIDDEN))
    together = arithmetic.compute(experts, [0, 3, 75, 80], rows, scales)
    for weights, (start, end) in zip(experts, ((0, 3), (3, 75), (75, 80)), strict=True):
        for row in (start, end - 1):
            scale = None if scales is None else scales[row : row + 1]
            alone = compute_expert(arithmetic, weights, rows[row : row + 1], scale)
            assert torch.equal(alone[0], together[row])


def test_biases_belong_to_the_content_hash() -> None:
    arithmetic = find_arithmetic("int8", "float32", HIDDEN, SIZE)
    one, other = biased_expert(5), biased_expert(5)
    assert arithmetic.prepare(one).content_hash() == arithmetic.prepare(other).content_hash()
    assert one.biases is not None
    one.biases.down[0] += 1
    assert arithmetic.prepare(one).content_hash() != arithmetic.prepare(other).content_hash()


@modes
def test_weights_with_biases_survive_the_way_to_another_worker(quantization: Quantization, dtype: RowDType) -> None:
    arithmetic = find_arithmetic(quantization, dtype, HIDDEN, SIZE)
    sent = arithmetic.prepare(biased_expert(6))
    activation = ClampedSwiGLU(1.7, 0.8)
    model = tiny_config(hidden_size=HIDDEN, expert_size=SIZE, expert_bias=True, activation=activation)
    found = read_weights(blank_weights(arithmetic, model), chunks(sent))
    assert found is not None
    assert found.content_hash() == sent.content_hash()
    rows, scales = inputs(arithmetic, torch.randn(3, HIDDEN))
    expected = compute_expert(arithmetic, sent, rows, scales)
    assert torch.equal(compute_expert(arithmetic, found, rows, scales), expected)
