"""Norm, activation and int8 products on a GPU, against the CPU's."""

from __future__ import annotations

import pytest
import torch

from consilium.gpu.linear import linear
from consilium.gpu.norm import activate, new_rows, rms_norm
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.quantization import Quantized, quantize_rows, quantize_weight
from consilium.silu import silu_and_multiply


@pytest.fixture(scope="module")
def product() -> IntegerProduct:
    return find_integer_product()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(device: torch.device, x: Quantized) -> Quantized:
    return Quantized(x.values.to(device), x.scales.to(device))


@pytest.mark.parametrize(("rows", "columns", "size"), [(1, 33, 64), (5, 40, 300), (70, 17, 72)])
def test_products_have_the_bits_of_the_cpu(
    device: torch.device, product: IntegerProduct, rows: int, columns: int, size: int
) -> None:
    x, w = quantize_rows(random(rows, size)), quantize_weight(random(columns, size, seed=1))
    bias, before = random(columns, seed=2), random(rows, columns, seed=3)
    out = before.clone().to(device)
    linear(on(device, x), on(device, w), out, bias.to(device), out)
    assert torch.equal(out.cpu(), before + (product.multiply(x, w) + bias))
    plain = torch.full((rows, columns), torch.nan, device=device)
    linear(on(device, x), on(device, w), plain)
    assert torch.equal(plain.cpu(), product.multiply(x, w))


def test_norm_against_float64_and_quantized_as_on_the_cpu(device: torch.device) -> None:
    x, weight = random(7, 72) * 3, random(72, seed=1)
    x[2], x[3, 5], x[4, 7] = 0, torch.nan, torch.inf
    normed, rows = torch.empty(7, 72, device=device), new_rows(7, 72, device)
    rms_norm(x.to(device), weight.to(device), 1e-6, rows, normed)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(normed.cpu().double()[[0, 1, 5, 6]], exact[[0, 1, 5, 6]], rtol=1e-6, atol=1e-7)
    expected = quantize_rows(normed.cpu())
    assert torch.equal(rows.values.cpu(), expected.values)
    torch.testing.assert_close(rows.scales.cpu(), expected.scales, rtol=0, atol=0, equal_nan=True)
    alone = new_rows(1, 72, device)
    rms_norm(x[5:6].to(device), weight.to(device), 1e-6, alone)
    assert torch.equal(alone.values[0].cpu(), rows.values[5].cpu())


def test_activation_has_the_bits_of_the_cpu(device: torch.device, product: IntegerProduct) -> None:
    gate, up = random(4, 80) * 20, random(4, 80, seed=1)
    gate[1, 3], up[2] = -200, 0
    rows = new_rows(4, 80, device)
    activate(torch.cat((gate, up), 1).to(device), rows)
    expected = product.quantize(silu_and_multiply(gate, up))
    assert torch.equal(rows.values.cpu(), expected.values)
    assert torch.equal(rows.scales.cpu(), expected.scales)
