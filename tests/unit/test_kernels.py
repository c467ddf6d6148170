"""The float kernels against their definitions in float64, and against themselves in other batches and chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from consilium import parallel
from consilium.gate import softmax_top_k
from consilium.kernels import arithmetic, attention, compiler, gate, norm, product
from consilium.kernels.float_tile import BFLOAT16, FLOAT32, LANES
from consilium.rope import apply_rope
from gateway.batch import Segment
from gateway.kv_cache import BLOCK, KVCache, blocks_for

EPSILON = np.float32(1e-5)


# -- products ------------------------------------------------------------------------------------------------------


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N] by the kernel; N a multiple of 16."""
    (rows, size), columns = a.shape, b.shape[1]
    out = torch.empty(rows, columns)
    left, right = (a.data_ptr(), 4 * size, 4, rows), (b.data_ptr(), 4 * columns, 4 * LANES, columns // LANES)
    product.product(FLOAT32, *left, *right, size, out.data_ptr(), 4 * columns, 4 * LANES)
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(0, 30), st.integers(1, 9), st.integers(0, 2**31))
def test_a_product_is_summed_in_order_without_fusing(rows: int, size: int, vectors: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rows, size, generator=generator), torch.randn(size, LANES * vectors, generator=generator)
    total = np.zeros((rows, LANES * vectors), np.float32)
    for k in range(size):
        total = total + a.numpy()[:, k, None] * b.numpy()[None, k]  # float32, rounded after each of the two
    assert np.array_equal(multiply(a, b).numpy(), total)


# -- attention -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One sequence for one attention layer."""

    heads: int
    kv_heads: int
    size: int
    positions: int
    window: int
    dtype: torch.dtype
    norms: bool
    shorter: int = 0  # elements that values have less than keys
    rotated: int | None = None
    sinks: bool = False

    @property
    def value_size(self) -> int:
        return self.size - self.shorter

    def sink_scores(self) -> Tensor:
        """[H]; -inf where there are none."""
        return torch.linspace(-1, 3, self.heads) if self.sinks else torch.full((self.heads,), -torch.inf)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """qkv, cosines, sines and the weights of the norms."""
        generator = torch.Generator().manual_seed(self.positions)
        width = (self.heads + self.kv_heads) * self.size + self.kv_heads * self.value_size
        angles = torch.randn(self.positions, (self.rotated or self.size) // 2, generator=generator)
        norms = [torch.rand(self.size, generator=generator) + 0.5 for _ in range(2)] if self.norms else []
        return torch.randn(self.positions, width, generator=generator), angles.cos(), angles.sin(), norms


CASES = [
    Case(9, 3, 64, 100, 0, torch.float32, norms=False),
    Case(4, 4, 6, 37, 5, torch.float32, norms=True),  # heads that fill no vector
    Case(8, 1, 32, 70, 20, torch.float32, norms=True),
    Case(6, 2, 24, 33, 0, torch.float32, norms=False),
    Case(9, 3, 64, 50, 33, torch.bfloat16, norms=False),
    Case(6, 2, 10, 33, 0, torch.bfloat16, norms=True),
    Case(6, 1, 40, 37, 0, torch.float32, norms=False, shorter=8, rotated=8),  # as multi-head latent attention has it
    Case(8, 2, 24, 50, 7, torch.float32, norms=False, sinks=True),
    Case(8, 1, 16, 35, 0, torch.bfloat16, norms=True, rotated=4, sinks=True),
]


def attend(case: Case, chunks: list[int]) -> Tensor:
    """The outputs [T, H, d] of a sequence that is computed in these chunks, in the second of two layers."""
    qkv, cos, sin, norms = case.inputs()
    room = blocks_for(case.positions)
    shape = (2, case.kv_heads, room)
    keys = torch.full((*shape, case.size, BLOCK), torch.nan, dtype=case.dtype)  # what is not written must not matter
    values = torch.full((2, case.kv_heads, room * BLOCK, case.value_size), torch.nan, dtype=case.dtype)
    cache = KVCache(keys, values, room)
    form = BFLOAT16 if case.dtype is torch.bfloat16 else FLOAT32
    sinks = case.sink_scores()
    addresses = [each.data_ptr() for each in norms] or [0, 0]
    weights = np.array([*addresses, sinks.data_ptr() if case.sinks else 0], np.int64)
    out = torch.empty(case.positions, case.heads, case.value_size)
    scratch = torch.empty(2 * max(attention.BLOCK, case.heads // case.kv_heads), room * BLOCK)
    first = 0
    for length in chunks:
        table = np.array(Segment(cache, first, length, first).numbers(), np.int64)
        sizes = case.heads, case.kv_heads, case.size, case.value_size, 2 * cos.shape[1], weights.ctypes.data, EPSILON
        turns = cos.data_ptr(), sin.data_ptr()
        memory = scratch.data_ptr(), 4 * room * BLOCK, out.data_ptr()
        everything = form, qkv.data_ptr(), *sizes, *turns, table.ctypes.data, 1, 1, case.window, *memory
        parallel.share(partial(attention.attend, *everything), 1, 2)
        first += length
    assert first == case.positions
    return out


def reference(case: Case) -> Tensor:
    """The same in float64, with the cache's rounding."""
    qkv, cos, sin, norms = case.inputs()
    heads = case.heads, case.kv_heads, case.kv_heads
    sizes = [count * size for count, size in zip(heads, (case.size, case.size, case.value_size), strict=True)]
    parts = zip(qkv.double().split(sizes, dim=1), heads, strict=True)
    q, k, v = (part.reshape(case.positions, count, -1) for part, count in parts)
    if norms:
        q, k = (functional.rms_norm(x, (case.size,), w.double(), 1e-5) for x, w in zip((q, k), norms, strict=True))
    turned = 2 * cos.shape[1]
    q, k = (torch.cat((apply_rope(x[..., :turned], cos.double(), sin.double()), x[..., turned:]), -1) for x in (q, k))
    k, v = k.float().to(case.dtype).double(), v.float().to(case.dtype).double()
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    at = torch.arange(case.positions)
    seen = at[None] <= at[:, None]
    if case.window:
        seen &= at[None] > at[:, None] - case.window
    scores = (torch.einsum("thd,shd->hts", q, k) / case.size**0.5).masked_fill(~seen, -torch.inf)
    sinks = case.sink_scores().double()[:, None, None].expand(-1, case.positions, 1)
    return torch.einsum("hts,shd->thd", torch.cat((scores, sinks), -1).softmax(-1)[..., :-1], v)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_as_defined(case: Case) -> None:
    tolerance = 1e-5 if case.dtype is torch.float32 else 1e-2
    assert torch.allclose(attend(case, [case.positions]).double(), reference(case), atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_attention_has_the_same_bits_in_any_chunks(case: Case, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, case.positions - 1)))
    chunks = [b - a for a, b in pairwise([0, *sorted(cuts), case.positions])]
    assert torch.equal(attend(case, chunks), attend(case, [case.positions]))


def test_attention_one_by_one() -> None:
    for case in CASES:
        assert torch.equal(attend(case, [1] * case.positions), attend(case, [case.positions]))


# -- gate ----------------------------------------------------------------------------------------------------------


def route(x: Tensor, weight: Tensor, top_k: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, K] by the kernel."""
    (rows, hidden), experts = x.shape, weight.shape[0]
    filled = torch.zeros(hidden, -(-experts // LANES) * LANES)
    filled[:, :experts] = weight.T
    scratch = torch.empty(rows, filled.shape[1])
    ids, weights = torch.empty(rows, top_k, dtype=torch.int64), torch.empty(rows, top_k)
    sizes = experts, top_k, int(normalize)
    addresses = scratch.data_ptr(), ids.data_ptr(), weights.data_ptr()
    gate.softmax_top_k(x.data_ptr(), rows, hidden, filled.data_ptr(), *sizes, *addresses)
    return ids, weights


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 4), (17, 17), (100, 8), (1, 1), (33, 3)])
def test_the_gate_is_as_defined(experts: int, top_k: int, normalize: bool) -> None:
    x, weight = torch.randn(9, 50), torch.randn(experts, 50) / 5
    ids, weights = route(x, weight, top_k, normalize=normalize)
    expected = softmax_top_k((x.double() @ weight.double().T).float(), top_k, normalize=normalize)
    assert torch.equal(ids, expected.ids)
    assert torch.allclose(weights, expected.weights, atol=1e-6)
    for row in range(9):
        alone = route(x[row : row + 1].clone(), weight, top_k, normalize=normalize)
        assert torch.equal(alone[0][0], ids[row])
        assert torch.equal(alone[1][0], weights[row])


def test_ties_go_to_the_lower_id() -> None:
    weight = torch.randn(1, 8).repeat(40, 1)
    weight[7] *= -1
    x = torch.randn(3, 8)
    better = (x @ weight[7]) > (x @ weight[0])  # expert 7 alone is another one
    ids, weights = route(x, weight, 9, normalize=True)
    for row in range(3):
        expected = [*range(8), 8] if better[row] else [*range(7), 8, 9]
        assert ids[row].tolist() == expected
    assert torch.allclose(weights.sum(1), torch.ones(3))


def test_a_row_that_is_not_finite_is_lost_alone() -> None:
    x, weight = torch.randn(3, 16), torch.randn(5, 16)
    ids, weights = route(x, weight, 2, normalize=True)
    x[1, 3] = torch.nan
    bad_ids, bad_weights = route(x, weight, 2, normalize=True)
    assert torch.equal(bad_ids[[0, 2]], ids[[0, 2]])
    assert torch.equal(bad_weights[[0, 2]], weights[[0, 2]])
    assert bad_ids[1].tolist() == [0, 1]
    assert bad_weights[1].isnan().all()


# -- norm and bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 15, 16, 72, 576])
def test_rms_norm(size: int) -> None:
    x, weight = torch.randn(5, size) * 3, torch.randn(size)
    out = torch.empty_like(x)
    norm.rms_norm(x.data_ptr(), 5, size, weight.data_ptr(), EPSILON, out.data_ptr())
    expected = functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert torch.allclose(out.double(), expected, rtol=1e-5)


@compiler.kernel
def round_all(x: NDArray[np.float32], bits: NDArray[np.uint16], back: NDArray[np.float32]) -> None:
    for i in range(x.shape[0]):
        bits[i] = arithmetic.to_bfloat16(x[i])
        back[i] = arithmetic.from_bfloat16(bits[i])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_is_torchs(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    bits, back = np.zeros(len(x), np.uint16), np.zeros(len(x), np.float32)
    round_all(x.numpy(), bits, back)
    expected = x.bfloat16()
    assert torch.equal(torch.from_numpy(back).nan_to_num(7.0), expected.float().nan_to_num(7.0))
    finite = ~x.isnan().numpy()
    assert np.array_equal(bits[finite], expected.view(torch.int16).numpy().view(np.uint16)[finite])
