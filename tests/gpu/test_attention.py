"""Attention over pages: against float64, and a row's bits whatever chunk, batch, split or pages it comes in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium.gpu.norm import new_rows
from consilium.quantization import Quantized
from gateway.gpu.attention import attend
from gateway.gpu.heads import HeadNorms, HeadShape, prepare
from gateway.gpu.pages import PAGE, LayerPages
from gateway.gpu.tiling import TILE, Tiles, Tiling

TILING = Tiling(rows=16, keys=16, chunk=16)
SHAPE = HeadShape(heads=4, kv_heads=2, size=24, rotated=24, epsilon=1e-6)
POSITIONS = 64


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Text:
    """A sequence: its projections, and what attention of each of its rows should be."""

    qkv: Tensor  # [positions, width]
    expected: Tensor  # [positions, H d] float64


def turns() -> tuple[Tensor, Tensor]:
    angles = torch.arange(POSITIONS)[:, None] / 10000 ** (torch.arange(SHAPE.rotated // 2) / 12)
    return angles.cos(), angles.sin()


def norms(*, whole: bool = False) -> HeadNorms:
    queries, keys = (heads * SHAPE.size if whole else SHAPE.size for heads in (SHAPE.heads, SHAPE.kv_heads))
    return HeadNorms(1 + 0.3 * random(queries, seed=1), 1 + 0.3 * random(keys, seed=2), whole)


def reference(qkv: Tensor, norm: HeadNorms, window: int) -> Tensor:
    """Written as plainly as it can be, in float64."""
    sizes = [heads * SHAPE.size for heads in (SHAPE.heads, SHAPE.kv_heads, SHAPE.kv_heads)]
    parts = qkv.double().split(sizes, dim=1)
    ready = []
    for part, weight in zip(parts[:2], (norm.queries, norm.keys), strict=True):
        x = part if norm.whole else part.unflatten(1, (-1, SHAPE.size))
        x = x / (x.square().mean(-1, keepdim=True) + SHAPE.epsilon).sqrt() * weight.double()
        x = x.reshape(len(qkv), -1, SHAPE.size)
        first, second = x.chunk(2, dim=-1)
        cos, sin = (each[: len(qkv), None].double() for each in turns())
        ready.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
    q, k, v = ready[0], ready[1], parts[2].unflatten(1, (-1, SHAPE.size))
    k, v = (each.repeat_interleave(SHAPE.group, 1) for each in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / SHAPE.size**0.5
    behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (behind < 0) | (behind >= window) if window else behind < 0
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


class Cache:
    """Pages of two sequences in odd order, and attention over them a step at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, norm: HeadNorms, window: int, seed: int) -> None:
        self.device, self.dtype, self.window = device, dtype, window
        self.norm = HeadNorms(norm.queries.to(device), norm.keys.to(device), norm.whole)
        shape = (12, SHAPE.kv_heads, PAGE, SHAPE.size)
        self.pages = LayerPages(*(torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)))
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed)) + 1
        self.table = np.array(order[:10].reshape(2, 5).numpy(), np.int32)

    def step(self, parts: list[tuple[int, Tensor, int]], *, split: bool) -> list[Quantized]:
        """Rows of sequence i from a position on, for each part (i, qkv, position)."""
        rows = [(row, position + n) for row, qkv, position in parts for n in range(len(qkv))]
        slots = [int(self.table[row, at // PAGE]) * PAGE + at % PAGE for row, at in rows]
        table: list[list[int]] = []
        first, most = 0, TILING.positions(SHAPE)
        for row, qkv, position in parts:
            table += [
                [first + start, min(most, len(qkv) - start), position + start, row]
                for start in range(0, len(qkv), most)
            ]
            first += len(qkv)
        positions = self._ints([at for _, at in rows])
        chunks = TILING.chunks(max(at for _, at in rows) + 1)
        tiles = Tiles(self._ints(table).view(-1, TILE), self._ints(self.table), positions, chunks, split, TILING)
        qkv = torch.cat([each for _, each, _ in parts]).to(self.device, copy=True)
        queries = torch.empty(len(rows), SHAPE.heads, SHAPE.size, dtype=self.dtype, device=self.device)
        cos, sin = (each.to(self.device) for each in turns())
        prepare(qkv, SHAPE, self.norm, (cos, sin), positions, self._ints(slots), self.pages, queries)
        out = new_rows(len(rows), SHAPE.heads * SHAPE.size, self.device)
        attend(queries, SHAPE, self.pages, tiles, self.window, out)
        ends = np.cumsum([0] + [len(qkv) for _, qkv, _ in parts])
        return [Quantized(out.values[a:b].cpu(), out.scales[a:b].cpu()) for a, b in pairwise(ends)]

    def _ints(self, numbers: object) -> Tensor:
        return torch.from_numpy(np.array(numbers, np.int32)).to(self.device)


def same(found: Quantized, expected: Quantized) -> bool:
    return torch.equal(found.values, expected.values) and torch.equal(found.scales, expected.scales)


CASES = [(torch.float32, 0, False), (torch.bfloat16, 7, True)]


@pytest.mark.parametrize(("dtype", "window", "whole"), CASES, ids=["float32", "window"])
def test_attention(device: torch.device, dtype: torch.dtype, window: int, whole: bool) -> None:
    norm = norms(whole=whole)
    one, other = random(36, SHAPE.width, seed=3), random(18, SHAPE.width, seed=4)
    at_once = Cache(device, dtype, norm, window, 0).step([(0, one, 0), (1, other, 0)], split=False)
    # int8 takes up to half of its largest, bfloat16 2^-8 of queries, keys, values and probabilities.
    for found, text in zip(at_once, (one, other), strict=True):
        exact = reference(text, norm, window)
        error = (found.values * found.scales[:, None].double() - exact).norm() / exact.norm()
        assert error < (0.012 if dtype is torch.bfloat16 else 0.01)
    cache = Cache(device, dtype, norm, window, 1)
    cache.step([(1, one[:20], 0)], split=False)
    chunk, beside = cache.step([(1, one[20:35], 20), (0, other[:17], 0)], split=True)
    last, decoded = cache.step([(1, one[35:], 35), (0, other[17:], 17)], split=True)
    assert same(chunk, Quantized(*(each[20:35] for each in at_once[0])))
    assert same(beside, Quantized(*(each[:17] for each in at_once[1])))
    assert same(last, Quantized(*(each[35:] for each in at_once[0])))
    assert same(decoded, Quantized(*(each[17:] for each in at_once[1])))
    alone = cache.step([(0, other[17:], 17)], split=False)[0]
    assert same(alone, decoded)
