from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilium import integer_product
from consilium.errors import ConsiliumError
from consilium.integer_product import CANDIDATES, IntegerProduct, find_integer_product, find_mistake

PROVED = find_integer_product()
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 2100))


def float_blocks() -> IntegerProduct:
    """The candidate that must be right on every machine."""
    (found,) = [product for product in CANDIDATES if product.name == "float32 blocks"]
    return found


def saturating(x: Tensor, w: Tensor) -> Tensor:
    """What vpmaddubsw does on CPUs without VNNI: sums of two products, x shifted to uint8, stop at 32767."""
    products = (x.long() + 128)[:, None, :] * w.long()[None, :, :]
    if products.shape[2] % 2:
        products = torch.nn.functional.pad(products, (0, 1))
    pairs: Tensor = products.view(*products.shape[:2], -1, 2).sum(3).clamp(-32768, 32767)
    return (pairs.sum(2) - 128 * w.long().sum(1)).int()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**31), st.booleans())
def test_what_was_proved_is_exact_everywhere(size: tuple[int, int, int], seed: int, extreme: bool) -> None:
    rows, outputs, summed = size
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (rows, summed), dtype=torch.int8, generator=generator)
    w = torch.randint(-128, 128, (outputs, summed), dtype=torch.int8, generator=generator)
    if extreme:
        x, w = x.sign() * 127, w.sign() * 127
    expected = x.long() @ w.long().T
    for product in (PROVED, float_blocks()):
        assert torch.equal(product.multiply(x, w).long(), expected), product.name


@pytest.mark.parametrize("product", CANDIDATES, ids=lambda product: product.name)
def test_sums_of_one_product(product: IntegerProduct) -> None:
    """torch._int_mm alone is wrong here, which must not cost its users the fastest candidate."""
    x, w = torch.tensor([[127], [-128]], dtype=torch.int8), torch.tensor([[-127], [3], [0]], dtype=torch.int8)
    assert product.multiply(x, w).tolist() == [[-16129, 381, 0], [16256, -384, 0]]


def test_a_longer_sum_than_float32_can_hold() -> None:
    x, w = torch.full((2, 14336), 127, dtype=torch.int8), torch.full((3, 14336), 127, dtype=torch.int8)
    w[1, ::2], w[2, 0] = -127, 126
    expected = x.long() @ w.long().T
    assert expected.max() > 2**24
    for product in (PROVED, float_blocks()):
        assert torch.equal(product.multiply(x, w).long(), expected), product.name


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
    assert "wrong integers" in str(find_mistake(IntegerProduct("wrong", wrong)))


def test_a_product_wrong_only_at_the_models_shape_is_found_out() -> None:
    def wrong(x: Tensor, w: Tensor) -> Tensor:
        product: Tensor = x.int() @ w.int().T
        return product + int(w.shape == (96, 320))

    product = IntegerProduct("wrong", wrong)
    assert find_mistake(product) is None
    assert "[96, 320]" in str(find_mistake(product, [(96, 320)]))


def test_the_next_candidate_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def absent(x: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError("not on this CPU")

    candidates = (IntegerProduct("absent", absent), IntegerProduct("bad", saturating), float_blocks())
    monkeypatch.setattr(integer_product, "CANDIDATES", candidates)
    with caplog.at_level("INFO"):
        assert find_integer_product().name == "float32 blocks"
    assert "absent is not used: not on this CPU" in caplog.text
    assert "bad is not used: wrong integers" in caplog.text
    assert "integer product: float32 blocks" in caplog.text


def test_none_right_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_product, "CANDIDATES", (IntegerProduct("bad", saturating),))
    with pytest.raises(ConsiliumError, match=r"bad: wrong integers.*--quantization none"):
        find_integer_product()
