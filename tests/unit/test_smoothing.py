"""How far smoothing moves a channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from consilium.smoothing import LARGEST, Array, Shift, choose_exponents, fold

MAGNITUDES = arrays(np.float32, 7, elements=st.floats(0, 2.0**100, width=32))


def magnitudes(*values: float) -> Array:
    return np.array(values, np.float32)


def test_the_formula() -> None:
    activations, weights = magnitudes(1, 16, 1, 4, 1), magnitudes(1, 1, 4, 4, 1)
    assert choose_exponents(activations, weights, 0.5).tolist() == [0, 2, -1, 0, 0]
    assert choose_exponents(activations, weights, 1.0).tolist() == [0, 4, 0, 2, 0]
    assert choose_exponents(activations, weights, 0.0).tolist() == [0, 0, -2, -2, 0]


def test_channels_without_anything_stay() -> None:
    activations, weights = magnitudes(0, 8, 2, 8, 8), magnitudes(1, 0, 2, 2, 2)
    assert choose_exponents(activations, weights, 1.0).tolist() == [0, 0, -2, 0, 0]
    nothing = magnitudes(0, 0)
    assert choose_exponents(nothing, nothing, 0.5).tolist() == [0, 0]


@given(MAGNITUDES, MAGNITUDES, st.floats(0, 1))
def test_exponents_are_bounded(activations: Array, weights: Array, strength: float) -> None:
    exponents = choose_exponents(activations, weights, strength)
    assert exponents.dtype == np.int8
    assert np.abs(exponents).max() <= LARGEST


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_size_of_a_model_does_not_matter(size: float) -> None:
    random = np.random.default_rng(1)
    activations, weights = (random.lognormal(size=64).astype(np.float32) for _ in range(2))
    scaled = choose_exponents(activations * np.float32(size), weights, 0.6)
    assert np.abs(scaled - choose_exponents(activations, weights, 0.6)).max() <= 1  # rounding may fall the other way


def test_fold_scales_rows_and_columns() -> None:
    rows, columns = np.array([1, -2]), np.array([0, 3, -1])
    matrix = np.array([[1, 2, 3], [5, 7, 11]], np.float32)
    found = fold(matrix, Shift(rows, columns))
    assert found.dtype == np.float32
    assert found.tolist() == [[2, 32, 3], [1.25, 14, 1.375]]
    assert fold(magnitudes(3, 5), Shift(rows=rows)).tolist() == [6, 1.25]
    assert fold(matrix, None) is matrix
