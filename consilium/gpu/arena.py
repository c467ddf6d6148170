"""What a gateway and its workers share on a device: the rows of one layer at a time, and whose turn it is.

The gateway owns it. It writes rows, scales and expert ids; every worker writes the output rows of its own pairs, in the
pairs' own places, so several workers fill one buffer. There is one set for all layers: nobody writes rows of the next
layer before all outputs of this one were there and were combined.

Letters: L layers with experts, E experts in a layer, T most tokens of a step, K experts of a token, D hidden size.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from consilium.errors import WireError

LINE = 32  # int32 words from one flag to the next: a cache line each
ALIGNMENT = 256  # bytes; what device memory begins at
LARGEST = 2**36  # bytes that a peer can make us map
MOST_WORKERS = 16
# Rows of the steps that are recorded once and replayed: finer where more rows cost more time.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Bits of ``broken``. Worker i that was waited for in vain, or cannot do its part, is bit i.
GATEWAY_SILENT = 1 << 29  # a worker waited for the gateway in vain
ABORTED = 1 << 30  # a host said so
_DTYPES = (torch.int8, torch.bfloat16, torch.float32)
_SHAPE = struct.Struct("<8I")


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """The sizes that both ends must agree on."""

    layers: int
    experts: int
    tokens: int
    top_k: int
    hidden_size: int
    workers: int
    rows: torch.dtype  # int8 rows have scales
    replies: torch.dtype

    def pack(self) -> bytes:
        """Fixed numbers, for a packet."""
        *sizes, rows, replies = astuple(self)
        return _SHAPE.pack(*sizes, _DTYPES.index(rows), _DTYPES.index(replies))

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> ArenaShape:
        """Raises WireError for sizes that no arena has."""
        layers, experts, tokens, top_k, hidden_size, workers, rows, replies = sizes = _SHAPE.unpack(data)
        if not all(sizes[:6]) or max(rows, replies) >= len(_DTYPES) or workers > MOST_WORKERS:
            raise WireError(f"no arena has these sizes and dtypes: {sizes}")
        shape = cls(layers, experts, tokens, top_k, hidden_size, workers, _DTYPES[rows], _DTYPES[replies])
        if shape.size > LARGEST:
            raise WireError(f"an arena of {shape.size} bytes is more than {LARGEST}")
        return shape

    @property
    def pairs(self) -> int:
        """T * K."""
        return self.tokens * self.top_k

    @property
    def places(self) -> tuple[_Place, ...]:
        """Every part, in order."""
        words = (2 + self.workers) * LINE
        parts = (
            ((words,), torch.int32),
            ((self.layers, self.experts), torch.int32),
            ((self.tokens, self.top_k), torch.int32),
            ((self.tokens,), torch.float32),
            ((self.tokens, self.hidden_size), self.rows),
            ((self.pairs, self.hidden_size), self.replies),
        )
        places, begin = [], 0
        for shape, dtype in parts:
            places.append(_Place(begin, shape, dtype))
            begin = -(-places[-1].end // ALIGNMENT) * ALIGNMENT
        return tuple(places)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.places[-1].end


class _Place(NamedTuple):
    """Where one part lies, in bytes."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        count = 1
        for each in self.shape:
            count *= each
        return self.begin + count * self.dtype.itemsize


class Arena:
    """Views on the memory of an arena."""

    def __init__(self, shape: ArenaShape, memory: Tensor) -> None:
        """``memory`` is bytes, uint8 [at least shape.size], of the device where they lie."""
        self.shape = shape
        flags, owners, ids, scales, rows, outputs = (_view(memory, each) for each in shape.places)
        self.request, self.broken = flags[0], flags[LINE]  # [] how far the gateway is; why nobody waits any more
        self.done = [flags[(2 + worker) * LINE] for worker in range(shape.workers)]  # how far each worker is
        self.owners = owners  # [L, E] int32: which worker computes an expert
        self.ids = ids  # [T, K] int32; -1: none
        self.scales = scales  # [T] float32, of int8 rows
        self.rows = rows  # [T, D]
        self.outputs = outputs  # [T * K, D] one row of each pair

    def prepare(self) -> None:
        """Until everybody is ready nobody waits for anybody, and no row asks for anything: kernels can be tried."""
        self.broken.fill_(ABORTED)
        self.owners.fill_(-1)
        self.ids.fill_(-1)

    def begin(self) -> None:
        """Everybody is ready, and the first step begins at 0."""
        for word in (self.request, *self.done, self.broken):
            word.zero_()


def _view(memory: Tensor, place: _Place) -> Tensor:
    return memory[place.begin : place.end].view(place.dtype).view(place.shape)
