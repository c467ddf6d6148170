"""Device arithmetic against the CPU's, bit for bit."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from consilium.activation import activate
from consilium.gpu.arithmetic import bfloat16_bits, clamped_swiglu, exp, silu_and_multiply
from consilium.gpu.jit import EXACT, jit
from consilium.gpu.quantize import MOST_AT_ONCE, quantize_rows
from consilium.model_config import ClampedSwiGLU
from consilium.quantization import quantize_rows as defined_quantize_rows
from consilium.silu import exp as defined_exp
from consilium.silu import silu_and_multiply as defined_silu

COUNT = 4096
ODD = (0.0, -0.0, 1.0, -1.0, 88.7, 89.0, 89.1, -87.4, -88.0, -1e30, 1e30, 1e-40, -1e-40, 3.4e38)


def floats(seed: int) -> Tensor:
    """Of every size, with infinities and NaNs; [COUNT]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(COUNT, generator=generator) * 10 ** torch.empty(COUNT).uniform_(-6, 3, generator=generator)
    x[: len(ODD)] = torch.tensor(ODD)
    x[len(ODD) : len(ODD) + 3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return x[torch.randperm(COUNT, generator=generator)]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """NaNs count as equal whatever their bits."""
    found, expected = found.cpu(), expected.cpu()
    return bool(((found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())).all())


@jit
def _each(
    x: tl.tensor, y: tl.tensor, out: tl.tensor, bits: tl.tensor, alpha: tl.tensor, limit: tl.tensor, N: tl.constexpr
) -> None:
    place = tl.arange(0, N)
    a, b = tl.load(x + place), tl.load(y + place)
    tl.store(out + place, exp(a))
    tl.store(out + N + place, silu_and_multiply(a, b))
    tl.store(out + 2 * N + place, clamped_swiglu(a, b, alpha, limit))
    tl.store(bits + place, bfloat16_bits(a))


def test_element_by_element(device: torch.device) -> None:
    x, y = floats(1), floats(2)
    out = torch.empty(3, COUNT, device=device)
    bits = torch.empty(COUNT, dtype=torch.int16, device=device)
    _each[(1,)](x.to(device), y.to(device), out, bits, 1.702, 7.0, COUNT, **EXACT)
    assert same_bits(out[0], defined_exp(x))
    assert same_bits(out[1], defined_silu(x, y))
    assert same_bits(out[2], activate(x, y, ClampedSwiGLU(1.702, 7.0)))
    assert same_bits(bits.view(torch.bfloat16).float(), x.bfloat16().float())


def test_rows_are_quantized_as_defined(device: torch.device) -> None:
    for rows, size in ((1, 1), (5, 72), (3, MOST_AT_ONCE + 5)):
        x = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
        x[-1] = torch.arange(size) - size / 2  # ties
        found, expected = quantize_rows(x.to(device)), defined_quantize_rows(x)
        assert torch.equal(found.values.cpu(), expected.values)
        assert same_bits(found.scales, expected.scales)


def test_odd_rows_are_quantized_as_defined(device: torch.device) -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    x[0], x[1, 3], x[2, 5], x[3] = 0.0, torch.inf, torch.nan, x[3] * 1e-37
    x[4] *= 3e38 / x[4].abs().max()
    for given in (x, x.bfloat16()):
        found, expected = quantize_rows(given.to(device)), defined_quantize_rows(given)
        assert torch.equal(found.values.cpu(), expected.values)
        assert same_bits(found.scales, expected.scales)
    assert quantize_rows(x[:0].to(device)).values.shape == (0, 40)
