from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.integer_product import find_integer_product
from consilium.quantization import Quantized, quantize_rows, quantize_weight

Floats = NDArray[np.float32]
PRODUCT = find_integer_product()
MATRICES = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(width=32, allow_nan=False)
)
ROWS = st.integers(1, 9) | st.integers(30, 70)  # few for the kernel, many for torch
TINY = np.finfo(np.float32).tiny


def emulate(x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The definition in the module's docstring, element by element in float64: exact before each rounding to float32.

    The quotient of two float32, rounded to float64 and then to float32, is the float32 quotient: 53 >= 2 · 24 + 2.
    """
    values, scales = np.zeros(x.shape, np.int64), np.zeros(x.shape[0], np.float32)
    for i, row in enumerate(x):
        scales[i] = np.float32(np.float64(np.abs(row).max()) / 127)
        if not np.isfinite(row).all():
            scales[i] = np.nan
        elif scales[i] < TINY:
            scales[i] = 0
        else:
            quotients = (row.astype(np.float64) / np.float64(scales[i])).astype(np.float32)
            values[i] = [round(float(quotient)) for quotient in quotients]  # Python rounds half to even
    return values, scales


@settings(max_examples=300, deadline=None)
@given(MATRICES)
def test_rows_are_quantized_as_defined(x: Floats) -> None:
    quantized = quantize_rows(torch.from_numpy(x))
    values, scales = emulate(x)
    assert np.array_equal(quantized.values.numpy(), values)
    assert np.array_equal(quantized.scales.numpy(), scales, equal_nan=True)
    assert quantized.values.abs().max() <= 127
    kernel = PRODUCT.quantize(torch.from_numpy(x))
    assert torch.equal(kernel.values, quantized.values)
    assert np.array_equal(kernel.scales.numpy(), scales, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(MATRICES, st.data())
def test_a_row_is_the_same_in_any_batch(x: Floats, data: st.DataObject) -> None:
    rows = torch.from_numpy(x)
    together = quantize_rows(rows)
    index = data.draw(st.integers(0, len(x) - 1))
    alone = quantize_rows(rows[index : index + 1])
    assert torch.equal(alone.values[0], together.values[index])
    assert alone.scales.view(torch.int32)[0] == together.scales.view(torch.int32)[index]


def test_halves_go_to_the_even_number() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantize_rows(row).values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(5, 33).to(dtype)
    quantized = quantize_rows(x)
    assert torch.equal(quantized.values, quantize_rows(x.float()).values)
    assert quantized.values.dtype == torch.int8
    assert quantized.scales.dtype == torch.float32


def test_odd_rows_do_not_touch_the_others() -> None:
    x = torch.randn(7, 16)
    clean = quantize_rows(x)
    x[1], x[2, 3], x[3, 0], x[4, 5], x[5] = 0.0, torch.nan, torch.inf, -torch.inf, 1e-44
    quantized = quantize_rows(x)
    for untouched in (0, 6):
        assert torch.equal(quantized.values[untouched], clean.values[untouched])
        assert quantized.scales[untouched] == clean.scales[untouched]
    assert not quantized.values[1:6].any()
    assert quantized.scales[[1, 5]].tolist() == [0.0, 0.0]
    assert quantized.scales[2:5].isnan().all()
    kernel = PRODUCT.quantize(x)
    assert torch.equal(kernel.values, quantized.values)
    assert torch.equal(kernel.scales.nan_to_num(-1.0), quantized.scales.nan_to_num(-1.0))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_nothing_at_all(shape: tuple[int, int]) -> None:
    quantized = quantize_rows(torch.empty(shape))
    assert quantized.values.shape == shape
    assert quantized.scales.tolist() == [0.0] * shape[0]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9) | st.integers(30, 70),
    st.integers(1, 20),
    st.integers(1, 300),
    st.integers(0, 2**31),
    st.integers(-30, 30),
)
def test_a_product_is_as_defined(rows: int, outputs: int, summed: int, seed: int, magnitude: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = quantize_rows(torch.randn(rows, summed, generator=generator) * 2.0**magnitude)
    w = quantize_weight(torch.randn(outputs, summed, generator=generator))
    assert torch.equal(PRODUCT.multiply(x, w), emulate_product(x, w))


def emulate_product(x: Quantized, w: Quantized) -> Tensor:
    """int64 sums, then each of the three roundings by itself: a product of two float32 is exact in float64."""
    sums = (x.values.long() @ w.values.long().T).numpy()
    scaled = (sums.astype(np.float32).astype(np.float64) * x.scales.double().numpy()[:, None]).astype(np.float32)
    return torch.from_numpy((scaled.astype(np.float64) * w.scales.double().numpy()).astype(np.float32))


def test_a_row_that_is_not_finite_gives_nans_of_its_own_only() -> None:
    x = torch.randn(3, 32)
    w = quantize_weight(torch.randn(5, 32))
    clean = PRODUCT.multiply(quantize_rows(x), w)
    x[1, 4] = torch.inf
    poisoned = PRODUCT.multiply(quantize_rows(x), w)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def test_a_row_of_weights_too_long_for_int32_is_refused() -> None:
    with pytest.raises(CheckpointError, match="131072 weights are too long"):
        quantize_weight(torch.ones(1, 2**17))
