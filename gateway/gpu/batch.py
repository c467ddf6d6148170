"""The rows of one step as kernels of the device are told of them: int32 numbers, copied there all at once.

A decoding step is filled up to the size of a graph with copies of its first row, which so ask for no further experts;
their keys and values go to nobody's page.
Letters: T rows of the step, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.gpu import arena
from gateway.batch import Segment, StepRows
from gateway.gpu.heads import HeadShape
from gateway.gpu.pages import PAGE, PagedCache
from gateway.gpu.tiling import TILE, Tiles, Tiling
from gateway.kv_cache import blocks_for

BUCKETS = arena.BUCKETS  # rows that a graph is made for; those of workers, too
# Partial results of attention, rows by chunks, that there is memory for; else a program walks through all chunks.
MOST_PARTIALS = 8192
ALIGNED = 4  # int32: kernels are compiled for tensors that begin at multiples of 16 bytes, and anew for others


@dataclass(frozen=True, slots=True)
class StepShape:
    """What launches depend on: equal for steps that one graph serves."""

    rows: int
    tiles: int
    sequences: int
    chunks: int
    blocks: int  # of the longest sequence
    split: bool
    tiling: Tiling
    per_tile: int  # query positions of a tile

    def places(self) -> list[slice]:
        """Where the numbers of each kind lie: tokens, positions, slots, tiles, pages, how many tokens count."""
        sizes = [self.rows] * 3 + [TILE * self.tiles, self.sequences * self.blocks, 1]
        starts = accumulate(map(aligned, sizes), initial=0)
        return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step on the device: views of its numbers."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32
    slots: Tensor  # [T] int32: where the row's key and value go
    tiles: Tiles
    live: Tensor  # [1] int32: rows that are not there to fill up a graph


def aligned(numbers: int) -> int:
    """So many numbers, or a few more, so that what comes next begins where kernels are compiled for."""
    return -(-numbers // ALIGNED) * ALIGNED


def paged(segment: Segment) -> PagedCache:
    """The segment's cache."""
    if not isinstance(segment.cache, PagedCache):
        raise TypeError("kernels of the device read caches in pages")
    return segment.cache


def shape_of(batch: StepRows, tiling: Tiling, heads: HeadShape, *, graph: bool) -> StepShape:
    """The shape of a step: exact, or that of the graph which serves it."""
    per_tile = tiling.positions(heads)
    rows, sequences = len(batch.tokens), len(batch.segments)
    longest = max(each.position + each.length for each in batch.segments)
    tiles, chunks, blocks = sum(-(-each.length // per_tile) for each in batch.segments), tiling.chunks(longest), 0
    if graph:
        rows = tiles = sequences = next(each for each in BUCKETS if each >= rows)
        chunks = 1 << (chunks - 1).bit_length()
        blocks = chunks * tiling.chunk // PAGE
    split = chunks > 1 and rows * chunks <= MOST_PARTIALS
    return StepShape(rows, tiles, sequences, chunks, blocks or blocks_for(longest), split, tiling, per_tile)


def fits_a_graph(batch: StepRows) -> bool:
    """Whether it is a decoding step of no more rows than graphs have."""
    return not batch.prefill and len(batch.tokens) <= BUCKETS[-1]


def numbers_of(batch: StepRows, shape: StepShape) -> NDArray[np.int32]:
    """All numbers of a step, one kind after the other, as ``view`` takes them apart."""
    places = shape.places()
    numbers = np.zeros(places[-1].stop, np.int32)
    tokens, positions, slots, tiles, pages, live = (numbers[place] for place in places)
    tile, table = 0, tiles.reshape(-1, TILE)
    tokens[: len(batch.tokens)], live[0] = batch.tokens.numpy(), len(batch.tokens)
    for number, segment in enumerate(batch.segments):
        cache, first, row = paged(segment), segment.position, segment.row
        own = slice(row, row + segment.length)
        positions[own] = np.arange(first, first + segment.length)
        slots[own] = cache.slots(first, segment.length)
        used = blocks_for(first + segment.length)
        pages.reshape(-1, shape.blocks)[number, :used] = cache.pages[:used]
        for begin in range(0, segment.length, shape.per_tile):
            count = min(shape.per_tile, segment.length - begin)
            table[tile] = row + begin, count, first + begin, number
            tile += 1
    if len(batch.tokens) < shape.rows:
        for each in (tokens, positions):  # the slots are nobody's
            each[len(batch.tokens) :] = each[0]
        table[tile:] = [(row, 1, positions[0], 0) for row in range(tile, shape.tiles)]
    return numbers


def view(numbers: Tensor, shape: StepShape) -> DeviceStep:
    """The step whose ``numbers`` int32 lie on the device."""
    tokens, positions, slots, tiles, pages, live = (numbers[place] for place in shape.places())
    table, places = tiles.view(-1, TILE), pages.view(-1, shape.blocks)
    found = Tiles(table, places, positions, shape.chunks, shape.split, shape.tiling)
    return DeviceStep(tokens, positions, slots, found, live)


def to_device(numbers: NDArray[np.int32], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    host = torch.from_numpy(numbers)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
