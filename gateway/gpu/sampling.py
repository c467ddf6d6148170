"""The next token on the device: the likeliest, or one drawn as consilium.kernels.sampling defines it.

Sums are those of the CPU, bit for bit, but within the block of 512 in which the drawn token lies: there they are taken
in the device's own fixed order. top_k and top_p are the CPU's alone. Letters: S rows, V vocabulary, B blocks of it.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arithmetic import INFINITY_BITS, exp, magnitude
from consilium.gpu.jit import EXACT, jit, power_of_two, tiles_of
from consilium.kernels import sampling as defined
from consilium.kernels.float_tile import LANES

BLOCK = defined.BLOCK
WIDE = 4096  # numbers that one program looks at for the largest
BLOCKS = 8  # of 512 that one program adds up


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of logits [S, V] float32 the largest, and the lowest id of it, int32; -1 where one is not finite."""
    rows, size = logits.shape
    parts = tiles_of(size, WIDE)
    best = torch.empty(rows, parts, device=logits.device)
    where = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    _largest[(rows, parts)](logits, best, where, SIZE=size, WIDE=WIDE)
    value, ids = torch.empty(rows, device=logits.device), torch.empty(rows, dtype=torch.int32, device=logits.device)
    _best[(rows,)](best, where, value, ids, PARTS=parts, BLOCK=power_of_two(parts))
    return value, ids


def draw(logits: Tensor, top: Tensor, limits: Tensor, numbers: Tensor) -> Tensor:
    """int32 [S]: a token of each row of logits [S, V] float32, finite, whose largest are ``top`` [S].

    ``limits`` float32 [S, 2] are temperature, above 0, and min_p; ``numbers`` float64 [S] are uniform in [0, 1).
    """
    rows, size = logits.shape
    blocks = tiles_of(size, BLOCK)
    e = torch.empty(rows, size, device=logits.device)
    sums = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    sizes = {"SIZE": size, "TOTAL": blocks, "BLOCKS": BLOCKS, "BLOCK": BLOCK, "LANES": LANES}
    _weigh[(rows, tiles_of(blocks, BLOCKS))](logits, top, limits, e, sums, **sizes, **EXACT)
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _pick[(rows,)](e, sums, numbers, ids, SIZE=size, TOTAL=blocks, BLOCK=BLOCK, **EXACT)
    return ids


@jit
def _largest(logits: tl.tensor, best: tl.tensor, where: tl.tensor, SIZE: tl.constexpr, WIDE: tl.constexpr) -> None:
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * WIDE + tl.arange(0, WIDE)
    own = tl.load(logits + row * SIZE + place, mask=place < SIZE, other=float("-inf"))
    odd = tl.sum(((magnitude(own) >= INFINITY_BITS) & (place < SIZE)).to(tl.int32), axis=0) > 0
    found = tl.argmax(own, axis=0, tie_break_left=True)
    to = row * tl.num_programs(1) + part
    tl.store(best + to, tl.where(odd, float("inf"), tl.max(own, axis=0)))
    tl.store(where + to, tl.where(odd, -1, part * WIDE + found))


@jit
def _best(
    best: tl.tensor, where: tl.tensor, value: tl.tensor, ids: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    own = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    found = tl.argmax(own, axis=0, tie_break_left=True)
    tl.store(value + row, tl.max(own, axis=0))
    tl.store(ids + row, tl.load(where + row * PARTS + found))


@jit
def _weigh(
    logits: tl.tensor,
    top: tl.tensor,
    limits: tl.tensor,
    e: tl.tensor,
    sums: tl.tensor,
    SIZE: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """exp((x - largest) / temperature), 0 below min_p, and the sum of every block: sixteen lanes, then these."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    lane = tl.arange(0, LANES)
    temperature, least, most = tl.load(limits + 2 * row), tl.load(limits + 2 * row + 1), tl.load(top + row)
    lanes = tl.zeros((BLOCKS, LANES), tl.float64)
    for step in range(0, BLOCK, LANES):
        place = block[:, None] * BLOCK + step + lane[None, :]
        inside = place < SIZE
        x = tl.load(logits + row * SIZE + place, mask=inside, other=0.0)
        weight = exp(tl.math.div_rn(x - most, tl.broadcast_to(temperature, x.shape)))
        weight = tl.where((weight < least) | (place >= SIZE), 0.0, weight)
        tl.store(e + row * SIZE + place, weight, mask=inside)
        lanes = lanes + weight.to(tl.float64)
    total = tl.zeros((BLOCKS,), tl.float64)
    for each in tl.static_range(LANES):
        total = total + tl.sum(tl.where(lane[None, :] == each, lanes, 0.0), axis=1)
    tl.store(sums + row * TOTAL + block, total, mask=block < TOTAL)


@jit
def _pick(
    e: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    ids: tl.tensor,
    SIZE: tl.constexpr,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The id where the running total passes its share."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    for block in range(TOTAL):
        total = total + tl.load(sums + row * TOTAL + block)
    threshold = tl.load(numbers + row) * total
    before, running = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    chosen, searching = tl.zeros((), tl.int32), tl.full((), 1, tl.int32)
    for block in range(TOTAL):
        running = running + tl.load(sums + row * TOTAL + block)
        passed = (running > threshold) & (searching > 0)
        chosen = tl.where(passed, block, chosen)
        searching = tl.where(passed, 0, searching)
        before = tl.where(searching > 0, running, before)
    chosen = tl.where(searching > 0, TOTAL - 1, chosen)
    before = tl.where(searching > 0, before - tl.load(sums + row * TOTAL + TOTAL - 1), before)
    place = chosen * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(e + row * SIZE + place, mask=place < SIZE, other=0.0)
    passed = (own > 0.0) & (before + tl.cumsum(own.to(tl.float64), axis=0) > threshold)
    first = tl.min(tl.where(passed, place, SIZE), axis=0)
    last = tl.max(tl.where(own > 0.0, place, -1), axis=0)  # where rounding has put the threshold past the end
    tl.store(ids + row, tl.where(first < SIZE, first, tl.where(last >= 0, last, SIZE - 1)))
