"""Queries and keys made ready for attention: norms, rotation by position, and the pages that keys and values go to.

A row of qkv is queries [H, d], keys [Hkv, d] and values [Hkv, d], one after the other, float32.
Letters: T rows, H query heads, Hkv key-value heads, d head size, r rotated elements (the first ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arithmetic import bfloat16_bits
from consilium.gpu.jit import EXACT, jit, power_of_two, tiles_of
from consilium.gpu.norm import normalize
from gateway.gpu.pages import PAGE, LayerPages

AT_ONCE = 8  # heads of one program


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The heads of every layer of a model."""

    heads: int
    kv_heads: int
    size: int
    rotated: int
    epsilon: float
    clip: float | None = None  # queries, keys and values are clamped to this

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """Elements of a row of qkv."""
        return (self.heads + 2 * self.kv_heads) * self.size


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of queries and keys: weights [d] of each head, or of all heads together."""

    queries: Tensor
    keys: Tensor
    whole: bool


def prepare(
    qkv: Tensor,
    shape: HeadShape,
    norms: HeadNorms | None,
    turns: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    pages: LayerPages,
    queries: Tensor,
) -> None:
    """``queries`` [T, H, d] of the pages' dtype, and the keys and values of each row in their slot of the pages.

    ``turns`` are cosines and sines by position [positions, r/2]; ``positions`` and ``slots`` int32 [T].
    Heads normed all together are changed in ``qkv``.
    """
    rows = qkv.shape[0]
    if norms is not None and norms.whole:
        for weight, start in ((norms.queries, 0), (norms.keys, len(norms.queries))):
            block = power_of_two(len(weight))
            _norm_whole[(rows,)](qkv, weight, shape.epsilon, shape.width, start, len(weight), block, **EXACT)
    each = norms is not None and not norms.whole
    weights = (norms.queries, norms.keys) if norms is not None else (qkv, qkv)
    half = pages.keys.dtype is torch.bfloat16
    # The bits of bfloat16, which the interpreter would truncate to.
    targets = [tensor.view(torch.int16) if half else tensor for tensor in (queries, pages.keys, pages.values)]
    _prepare[(rows, tiles_of(shape.heads + 2 * shape.kv_heads, AT_ONCE))](
        qkv,
        *weights,
        shape.epsilon,
        *turns,
        positions,
        slots,
        *targets,
        HEADS=shape.heads,
        KV_HEADS=shape.kv_heads,
        SIZE=shape.size,
        ROTATED=shape.rotated,
        AT_ONCE=AT_ONCE,
        BLOCK=power_of_two(shape.size),
        CLIP=shape.clip or 0.0,
        NORM=each,
        HALF=half,
        PAGE=PAGE,
        **EXACT,
    )


@jit
def _norm_whole(
    qkv: tl.tensor,
    weight: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The RMS norm of SIZE elements of a row, from START on, in place."""
    place = tl.arange(0, BLOCK)
    inside = place < SIZE
    own = qkv + tl.program_id(0).to(tl.int64) * WIDTH + START + place
    y = normalize(tl.load(own, mask=inside, other=0.0), tl.load(weight + place, mask=inside, other=0.0), epsilon, SIZE)
    tl.store(own, y, mask=inside)


@jit
def _prepare(
    qkv: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    epsilon: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTATED: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    CLIP: tl.constexpr,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """AT_ONCE heads of one row: queries, then keys, then values are counted."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    place = tl.arange(0, BLOCK)
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (place < SIZE)[None, :]
    turning, first = place < ROTATED, place < ROTATED // 2
    partner = tl.where(turning, tl.where(first, place + ROTATED // 2, place - ROTATED // 2), place)
    x = qkv + (row * (HEADS + 2 * KV_HEADS) + head)[:, None] * SIZE
    own = tl.load(x + place[None, :], mask=inside, other=0.0)  # [heads, d]
    other = tl.load(x + partner[None, :], mask=inside, other=0.0)
    if CLIP > 0:
        own, other = tl.clamp(own, -CLIP, CLIP), tl.clamp(other, -CLIP, CLIP)
    turned, turned_by = own, other
    if NORM:
        mean = tl.math.div_rn(tl.sum(own * own, axis=1), tl.full((AT_ONCE,), SIZE, tl.float32))
        factor = tl.math.div_rn(tl.full((AT_ONCE,), 1.0, tl.float32), tl.math.sqrt_rn(mean + epsilon))[:, None]
        turned = own * factor * _weight(query_norm, key_norm, is_query, place, place < SIZE)
        turned_by = other * factor * _weight(query_norm, key_norm, is_query, partner, place < SIZE)
    angle = tl.load(positions + row).to(tl.int64) * (ROTATED // 2) + tl.where(first, place, partner)
    c = tl.load(cos + angle, mask=turning, other=1.0)[None, :]
    s = tl.load(sin + angle, mask=turning, other=0.0)[None, :]
    turned = turned * c + tl.where(first[None, :], -(turned_by * s), turned_by * s)
    _store(queries + (row * HEADS + head)[:, None] * SIZE + place[None, :], turned, inside & is_query[:, None], HALF)
    slot = tl.load(slots + row).to(tl.int64)
    line = (slot // PAGE) * KV_HEADS * PAGE + slot % PAGE
    kept = (line + (head - HEADS) * PAGE)[:, None] * SIZE + place[None, :]
    _store(keys + kept, turned, inside & is_key[:, None], HALF)
    _store(values + kept - KV_HEADS * PAGE * SIZE, own, inside & is_value[:, None], HALF)


@jit
def _weight(
    query_norm: tl.tensor, key_norm: tl.tensor, is_query: tl.tensor, place: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Elements of the norms' weights [heads, d]."""
    of_queries = tl.load(query_norm + place, mask=inside, other=0.0)
    of_keys = tl.load(key_norm + place, mask=inside, other=0.0)
    return tl.where(is_query[:, None], of_queries[None, :], of_keys[None, :])


@jit
def _store(target: tl.tensor, x: tl.tensor, inside: tl.tensor, HALF: tl.constexpr) -> None:
    if HALF:
        tl.store(target, bfloat16_bits(x), mask=inside)
    else:
        tl.store(target, x, mask=inside)
