"""The first level: rows in the engine's own memory, least recently used ones given up first.

Letters: N rows that fit, K experts per token, D hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

# What an entry takes beside its outputs: key, number, the dictionary's entry and its list node.
ENTRY_OVERHEAD = 256


class MemoryCache:
    """Rows by key, within ``capacity`` bytes. The system commits the memory as it is first written."""

    def __init__(self, capacity: int, dtype: torch.dtype, top_k: int, hidden_size: int) -> None:
        self.capacity = capacity
        self.evictions = 0  # since the start
        self._entry_bytes = top_k * hidden_size * dtype.itemsize + ENTRY_OVERHEAD
        self._rows = torch.empty(capacity // self._entry_bytes, top_k, hidden_size, dtype=dtype)  # [N, K, D]
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return len(self._places) * self._entry_bytes

    def clear(self) -> None:
        """Know nothing any more."""
        self._places.clear()

    def find(self, keys: Sequence[bytes | None]) -> tuple[list[int], Tensor]:
        """Which of ``keys`` are known, and their rows [n, K, D]; those are now the most recently used ones."""
        found: list[int] = []
        places: list[int] = []
        for position, key in enumerate(keys):
            if key is not None and (place := self._places.get(key)) is not None:
                self._places.move_to_end(key)
                found.append(position)
                places.append(place)
        return found, self._rows[places]

    def put(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Keep ``rows`` [n, K, D], as many as fit; what is known already is the same row."""
        count = min(len(keys), len(self._rows))
        if not count:
            return
        written: list[int] = []
        places: list[int] = []
        for position in range(len(keys) - count, len(keys)):
            key = keys[position]
            if key not in self._places:
                place = len(self._places)
                if place == len(self._rows):
                    _, place = self._places.popitem(last=False)
                    self.evictions += 1
                self._places[key] = place
                written.append(position)
                places.append(place)
        self._rows[places] = rows[written]
