"""How streams of two processes wait for each other on a device, without their hosts: words that only ever rise.

A word says how far its owner has come. Words are int32, LINE apart, and wrap around; what is compared is how far one is
behind. One more word, ``broken``, ends every wait at once: it is set by whoever waited too long, or by a host that
knows better. It is not cleared: a broken arena is left, so that nobody who comes late writes where others compute.
"""

from __future__ import annotations

import time

import torch
import triton.language as tl
from torch import Tensor

from consilium.gpu.arena import LINE
from consilium.gpu.jit import INTERPRETED, jit_for_any

_LINE = tl.constexpr(LINE)


def meet(
    base: Tensor,
    broken: Tensor,
    *,
    tell: Tensor | None = None,
    tell_at: int = 0,
    words: Tensor | None = None,
    count: int = 0,
    wait_at: int = 0,
    blame: int = 0,
    spins: int = 0,
) -> None:
    """Set ``tell`` to base + tell_at, then wait until each of ``count`` words from ``words`` on is at base + wait_at.

    All that this stream wrote before is seen by whoever sees ``tell``; all that was written before the words were set
    is seen by what comes after this in the stream. A word that is looked at ``spins`` times in vain puts its bit,
    blame << its place, into ``broken``. ``base``, read on the device, lets a graph be replayed for another step.
    """
    chosen = {"TELL": tell is not None, "COUNT": count}
    numbers = tell_at, wait_at, blame, spins
    _meet[(1,)](
        base, broken, broken if tell is None else tell, words if count else broken, *numbers, **chosen, num_warps=1
    )


@jit_for_any("tell_at", "wait_at", "blame", "spins")
def _meet(
    base: tl.tensor,
    broken: tl.tensor,
    tell: tl.tensor,
    words: tl.tensor,
    tell_at: tl.tensor,
    wait_at: tl.tensor,
    blame: tl.tensor,
    spins: tl.tensor,
    TELL: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    now = tl.load(base)
    if TELL:
        tl.atomic_xchg(tell, now + tell_at, sem="release", scope="sys")
    for place in tl.static_range(COUNT):
        word = words + place * _LINE
        target = now + wait_at
        looks = 0
        seen = tl.load(word, volatile=True)
        stop = tl.load(broken, volatile=True)
        while (seen - target < 0) & (stop == 0) & (looks < spins):
            seen = tl.load(word, volatile=True)
            stop = tl.load(broken, volatile=True)
            looks += 1
        # A plain load would order nothing; and what nobody uses the compiler leaves out.
        seen = tl.atomic_add(word, 0, sem="acquire", scope="sys")
        if (seen - target < 0) & (stop == 0):
            tl.atomic_or(broken, blame << place, sem="relaxed", scope="sys")


def own_pairs(
    ids: Tensor, owners: Tensor, held: Tensor, own: Tensor, broken: Tensor, *, worker: int, blame: int
) -> None:
    """``own`` [P] int32: the expert of each of ``ids`` [P] that ``owners`` [E] gives to this worker, and -1 elsewhere.

    Where ``broken`` is set there is nothing to do: all are -1. ``held`` [E, any] int64 has a 0 first in the row of
    every expert that is not here; one that this worker is to compute all the same puts ``blame`` into ``broken``.
    """
    pairs = ids.numel()
    experts, stride = owners.numel(), held.stride(0)
    grid = (-(-pairs // _PAIRS),)
    _own_pairs[grid](ids, owners, held, own, broken, pairs, experts, stride, worker, blame, BLOCK=_PAIRS)


_PAIRS = 1024  # of one program


@jit_for_any("pairs", "worker", "blame")
def _own_pairs(
    ids: tl.tensor,
    owners: tl.tensor,
    held: tl.tensor,
    own: tl.tensor,
    broken: tl.tensor,
    pairs: tl.tensor,
    experts: tl.tensor,
    stride: tl.tensor,
    worker: tl.tensor,
    blame: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [P]
    inside = pair < pairs
    stop = tl.load(broken, volatile=True)
    expert = tl.load(ids + pair, mask=inside, other=-1, volatile=True)
    known = (expert >= 0) & (expert < experts) & (stop == 0)
    mine = known & (tl.load(owners + expert, mask=known, other=-1, volatile=True) == worker)
    here = tl.load(held + expert * stride, mask=mine, other=1) != 0
    tl.store(own + pair, tl.where(mine & here, expert, -1), mask=inside)
    if tl.sum((mine & (here == 0)).to(tl.int32), axis=0) > 0:
        tl.atomic_or(broken, blame, sem="relaxed", scope="sys")


def spins_in(seconds: float, device: torch.device) -> int:
    """How often ``meet`` looks at a word on ``device`` in this time; measured."""
    looks = 20 if INTERPRETED else 20_000
    base, broken, word = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(3))

    def wait(spins: int) -> float:
        started = time.perf_counter()
        meet(base, broken, words=word, count=1, wait_at=1, blame=0, spins=spins)
        broken.item()  # waits for the device
        return time.perf_counter() - started

    wait(1)  # compiles it
    # The fastest of three: at first the clock is slow, and others may be at work. To wait too long harms less.
    taken = min(wait(looks) - wait(1) for _ in range(3))
    return max(looks, int(seconds * looks / max(1e-9, taken)))
