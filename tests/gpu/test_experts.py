"""Experts on a device against the CPU's: bit for bit in int8, close in floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import ExpertBiases, ExpertTensors
from consilium.config import Quantization, RowDType
from consilium.experts import Arithmetic, ExpertWeights
from consilium.gpu.experts import compute, form_of, table_of
from consilium.gpu.sort import Groups, sort_pairs
from consilium.gpu.tiling import Blocks, Tiling
from consilium.model_config import ClampedSwiGLU
from consilium.quantization import quantize_rows

SMALL = Tiling(16, Blocks(32, 32), Blocks(32, 32))
APART = Tiling(16, Blocks(16, 64), Blocks(64, 32), quantize_first=True)


def expert(seed: int, hidden: int, size: int, odd: bool = False) -> ExpertTensors:
    """``odd`` ones have biases and gpt-oss's activation."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (
        torch.randn(shape, generator=generator) / 6 for shape in ((size, hidden), (size, hidden), (hidden, size))
    )
    if not odd:
        return ExpertTensors(gate, up, down)
    biases = ExpertBiases(*(torch.randn(length, generator=generator) for length in (size, size, hidden)))
    return ExpertTensors(gate, up, down, biases, ClampedSwiGLU(1.7, 0.8))


def on(device: torch.device, weights: ExpertWeights) -> ExpertWeights:
    return weights.map(lambda tensor: tensor.to(device))


def expected(
    arithmetic: Arithmetic, experts: list[ExpertWeights | None], ids: Tensor, x: Tensor, out: Tensor
) -> Tensor:
    """``out`` [P, D] with the rows of all pairs whose expert is there, computed by the CPU."""
    rows, scales = quantize_rows(x) if arithmetic.row_dtype is torch.int8 else (x.to(arithmetic.row_dtype), None)
    for number, weights in enumerate(experts):
        pairs = (ids.flatten() == number).nonzero().flatten()
        if weights is not None and len(pairs):
            tokens = (pairs // ids.shape[1]).int()
            out[pairs] = arithmetic.compute([weights], [0, len(pairs)], rows, scales, None, tokens)
    return out


def found(
    arithmetic: Arithmetic,
    experts: list[ExpertWeights | None],
    ids: Tensor,
    x: Tensor,
    out: Tensor,
    device: torch.device,
    tiling: Tiling,
) -> Tensor:
    """The same, computed on the device."""
    placed = [None if weights is None else on(device, weights) for weights in experts]
    known = next(weights for weights in placed if weights is not None)
    form = form_of(known, arithmetic.row_dtype, arithmetic.reply_dtype)
    table = table_of(form, placed).to(device)
    groups = sort_pairs(ids.to(device), table, tiling.block_m)
    rows, scales = (
        quantize_rows(x.to(device)) if arithmetic.row_dtype is torch.int8 else (x.to(device, form.rows), None)
    )
    moved = out.to(device)
    compute(form, tiling, table, groups, rows, scales, moved)
    return moved.cpu()


def bits(rows: Tensor) -> Tensor:
    """NaNs count as equal whatever their bits."""
    whole = rows.view(torch.int16 if rows.dtype is torch.bfloat16 else torch.int32)
    return torch.where(rows.isnan(), 0, whole)


@pytest.mark.parametrize(
    ("dtype", "odd", "tiling"),
    [("bfloat16", False, SMALL), ("float32", True, SMALL), ("bfloat16", True, APART), ("float32", False, APART)],
    ids=["quantized within", "within, biased", "quantized first, biased", "quantized first"],
)
def test_int8_has_the_bits_of_the_cpu(device: torch.device, dtype: RowDType, odd: bool, tiling: Tiling) -> None:
    """Odd sizes, an expert without rows, one that is not held, one with many, rows that are not finite."""
    hidden, size, number, tokens, per_token = 72, 40, 5, 23, 2
    arithmetic = find_arithmetic("int8", dtype, hidden, size)
    experts: list[ExpertWeights | None] = [
        arithmetic.prepare(expert(each, hidden, size, odd)) for each in range(number)
    ]
    experts[3] = None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator)
    x[2], x[3, 5], x[4, 6], x[5] = 0.0, torch.inf, torch.nan, x[5] * 1e-38
    ids = torch.randint(number - 1, (tokens, per_token), generator=generator, dtype=torch.int32)
    ids[:, 0] = 1  # more rows than a tile has
    out = torch.full((tokens * per_token, hidden), 7.0, dtype=arithmetic.reply_dtype)
    on_cpu = expected(arithmetic, experts, ids, x, out.clone())
    on_device = found(arithmetic, experts, ids, x, out.clone(), device, tiling)
    assert torch.equal(bits(on_device), bits(on_cpu))
    assert (on_cpu == 7.0).all(1).any()  # somebody asked for the expert that is not held


def test_one_row(device: torch.device) -> None:
    arithmetic = find_arithmetic("int8", "bfloat16", 64, 32)
    experts: list[ExpertWeights | None] = [arithmetic.prepare(expert(each, 64, 32)) for each in range(2)]
    x, ids = torch.randn(1, 64), torch.ones(1, 1, dtype=torch.int32)
    out = torch.zeros(1, 64, dtype=torch.bfloat16)
    on_cpu = expected(arithmetic, experts, ids, x, out.clone())
    assert torch.equal(found(arithmetic, experts, ids, x, out.clone(), device, SMALL), on_cpu)


def test_no_rows(device: torch.device) -> None:
    weights = on(device, find_arithmetic("int8", "bfloat16", 64, 32).prepare(expert(0, 64, 32)))
    form = form_of(weights, torch.int8, torch.bfloat16)
    none = torch.empty(0, dtype=torch.int32, device=device)
    groups = Groups(none, none, torch.empty(0, 3, dtype=torch.int32, device=device), 16)
    empty = torch.empty(0, 64, dtype=torch.int8, device=device)
    compute(form, SMALL, table_of(form, [weights]).to(device), groups, empty, torch.empty(0), empty)


@pytest.mark.parametrize(
    ("quantization", "dtype", "odd", "bound"),
    [
        ("none", "bfloat16", True, 2e-2),
        ("none", "float32", False, 1e-5),
        ("int8-weight-only", "bfloat16", False, 2e-2),
        ("int8-weight-only", "float32", True, 1e-5),
    ],
)
def test_floats_are_close_and_do_not_depend_on_their_batch(
    device: torch.device, quantization: Quantization, dtype: RowDType, odd: bool, bound: float
) -> None:
    hidden, size, number = 72, 40, 3
    arithmetic = find_arithmetic(quantization, dtype, hidden, size)
    experts: list[ExpertWeights | None] = [
        arithmetic.prepare(expert(each, hidden, size, odd)) for each in range(number)
    ]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(19, hidden, generator=generator)
    ids = torch.randint(number, (19, 2), generator=generator, dtype=torch.int32)
    ids[:, 1] = 0
    out = torch.zeros(38, hidden, dtype=arithmetic.reply_dtype)
    on_cpu = expected(arithmetic, experts, ids, x, out.clone()).double()
    on_device = found(arithmetic, experts, ids, x, out.clone(), device, SMALL)
    assert (on_device.double() - on_cpu).norm() / on_cpu.norm() < bound
    alone = found(arithmetic, experts, ids[7:8], x[7:8], out[:2].clone(), device, SMALL)
    assert torch.equal(bits(alone), bits(on_device[14:16]))
