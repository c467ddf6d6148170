from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import integer_product
from consilium.errors import ConsiliumError
from consilium.integer_product import MANY_ROWS, find_integer_product, find_mistake, kernel_product, torch_product
from consilium.kernels import int8_tile
from consilium.kernels.int8_tile import PORTABLE, Kind
from consilium.quantization import MAX_SUMMED, quantize_rows, quantize_weight

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 2100))
KINDS = int8_tile.candidates()
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: int8_tile.NAMES[kind])


def saturating(x: Tensor, w: Tensor) -> Tensor:
    """What vpmaddubsw does on CPUs without VNNI: sums of two products, x shifted to uint8, stop at 32767."""
    products = (x.long() + 128)[:, None, :] * w.long()[None, :, :]
    if products.shape[2] % 2:
        products = torch.nn.functional.pad(products, (0, 1))
    pairs: Tensor = products.view(*products.shape[:2], -1, 2).sum(3).clamp(-32768, 32767)
    return (pairs.sum(2) - 128 * w.long().sum(1)).int()


@kinds
@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**31), extreme=st.booleans())
def test_a_kernel_is_exact_everywhere(kind: Kind, size: tuple[int, int, int], seed: int, extreme: bool) -> None:
    rows, outputs, summed = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, summed), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (outputs, summed), dtype=torch.int8, generator=generator)
    if extreme:
        x, w = x.sign() * 127, w.sign() * 127
    assert torch.equal(kernel_product(kind)(x, w), (x.long() @ w.long().T).float())


def test_sums_of_one_product() -> None:
    """torch._int_mm alone is wrong here, which must not cost its users the fastest way."""
    x, w = torch.tensor([[127], [-128]], dtype=torch.int8), torch.tensor([[-127], [3], [0]], dtype=torch.int8)
    for multiply in (torch_product, *map(kernel_product, KINDS)):
        assert multiply(x, w).tolist() == [[-16129, 381, 0], [16256, -384, 0]]


@kinds
def test_a_longer_sum_than_float32_can_hold(kind: Kind) -> None:
    x, w = torch.full((2, 14336), 127, dtype=torch.int8), torch.full((3, 14336), 127, dtype=torch.int8)
    w[1, ::2], w[2, 0] = -127, 126
    expected = x.long() @ w.long().T
    assert expected.max() > 2**24
    assert torch.equal(kernel_product(kind)(x, w), expected.float())


@kinds
@pytest.mark.parametrize("value", [127, -128])
def test_the_longest_sum_fills_int32(kind: Kind, value: int) -> None:
    """What VNNI adds for the weights' sign passes 2^32 on the way."""
    x = torch.full((3, MAX_SUMMED), value, dtype=torch.int8)
    expected = float(MAX_SUMMED * value**2)
    assert expected < 2**31
    assert kernel_product(kind)(x, x).unique().tolist() == [torch.tensor(expected).item()]


@pytest.mark.parametrize(
    "wrong",
    [
        saturating,
        lambda x, w: (x.float() @ w.float().T).to(torch.bfloat16).int(),
        lambda x, w: (x.bfloat16() @ w.bfloat16().T).int(),
        lambda x, w: x.int() @ w.int().T + int(x.shape[0] == 33),
    ],
    ids=["saturating", "rounded", "bfloat16", "wrong at 33 rows"],
)
def test_a_wrong_product_is_found_out(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "wrong integers" in str(find_mistake(wrong))


def test_a_product_wrong_only_at_the_models_shape_is_found_out() -> None:
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        product: Tensor = x.int() @ w.int().T
        return product + int(w.shape == (96, 320))

    assert find_mistake(wrong) is None
    assert "[96, 320]" in str(find_mistake(wrong, [(96, 320)]))


def test_a_wrong_kernel_is_refused_and_a_right_one_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: Kind = (0, 0)
    monkeypatch.setitem(int8_tile.NAMES, damaged, "damaged")
    monkeypatch.setattr(int8_tile, "candidates", lambda: [damaged, PORTABLE])
    right = kernel_product
    monkeypatch.setattr(integer_product, "kernel_product", lambda kind: saturating if kind == damaged else right(kind))
    with caplog.at_level("INFO"):
        assert find_integer_product().kind == PORTABLE
    assert "damaged int8 kernel is not used: wrong integers" in caplog.text
    assert "integer product: portable kernel" in caplog.text


def test_torchs_product_is_left_out_where_it_is_wrong_or_absent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(x: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError("not on this CPU")

    many = torch.ones(MANY_ROWS + 3, 40)
    w = quantize_weight(torch.randn(9, 40))
    for other, reason in ((absent, "not on this CPU"), (saturating, "wrong integers")):
        monkeypatch.setattr(integer_product, "torch_product", other)
        product = find_integer_product()
        assert product.many is None
        assert f"torch._int_mm is not used for many rows: {reason}" in caplog.text
        sums = 127 * w.values.float().sum(1)
        assert torch.equal(product.multiply(quantize_rows(many), w)[0], sums * (torch.ones(1) / 127) * w.scales)


def test_none_right_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_product, "kernel_product", lambda _: saturating)
    with pytest.raises(ConsiliumError, match=r"no int8 kernel is exact.*--quantization none"):
        find_integer_product()
