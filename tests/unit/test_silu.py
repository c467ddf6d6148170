from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from consilium.kernels.arithmetic import COEFFICIENTS, LN2_HIGH, LN2_LOW, LOG2_E
from consilium.silu import exp, silu_and_multiply

Floats = NDArray[np.float32]
single = np.float32


def exp_of_one(x: np.float32) -> np.float32:
    """The definition, one element and one rounding at a time: every step is exact in float64 before it is rounded."""

    def times(a: np.float32, b: np.float32) -> np.float32:
        return single(np.float64(a) * np.float64(b))

    def plus(a: np.float32, b: np.float32) -> np.float32:
        return single(np.float64(a) + np.float64(b))

    x = min(max(x, single(-88.0)), single(89.0))
    n = single(round(float(times(x, LOG2_E))))
    r = plus(plus(x, -times(n, LN2_HIGH)), -times(n, LN2_LOW))
    p = COEFFICIENTS[-1]
    for coefficient in reversed(COEFFICIENTS[:-1]):
        p = plus(times(p, r), coefficient)
    power = single(0.0 if n <= -127 else np.inf if n >= 128 else 2.0 ** float(n))
    return p * power


@settings(max_examples=300, deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_exp_is_as_defined(x: float) -> None:
    assert single(exp(torch.tensor([x])).item()) == exp_of_one(single(x))


def test_exp_is_close_to_exp() -> None:
    x = np.linspace(-87, 88, 1_000_003).astype(single)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp(torch.from_numpy(x)).numpy() - exact) / exact).max() < 1e-7


@settings(max_examples=100, deadline=None)
@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=50), elements=st.floats(-50, 50, width=32)),
    st.data(),
)
def test_an_element_is_the_same_in_any_row_and_batch(gate: Floats, data: st.DataObject) -> None:
    up = np.ones_like(gate)
    together = silu_and_multiply(torch.from_numpy(gate), torch.from_numpy(up))
    row = data.draw(st.integers(0, gate.shape[0] - 1))
    column = data.draw(st.integers(0, gate.shape[1] - 1))
    alone = silu_and_multiply(torch.tensor([[gate[row, column]]]), torch.ones(1, 1))
    assert alone.item() == together[row, column].item()


def test_close_to_torch() -> None:
    gate, up = torch.randn(300, 200) * 8, torch.randn(300, 200)
    ours = silu_and_multiply(gate, up)
    assert torch.allclose(ours, torch.nn.functional.silu(gate) * up, rtol=1e-6, atol=1e-7)


def test_the_far_ends() -> None:
    gate = torch.tensor([[1e30, -1e30, 89.0, -89.0, 0.0, torch.inf, torch.nan, 3.4e38, -3.4e38]])
    values = silu_and_multiply(gate, torch.ones_like(gate))[0]
    assert values[:6].tolist() == [single(1e30), 0.0, 89.0, 0.0, 0.0, torch.inf]
    assert values[6].isnan()
    assert values[7:].tolist() == [single(3.4e38), 0.0]


def test_no_rows() -> None:
    assert silu_and_multiply(torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4)
