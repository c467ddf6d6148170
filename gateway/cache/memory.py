"""The first level: rows in the engine's own memory, least recently used ones given up first."""

from __future__ import annotations

from collections import OrderedDict

# What an entry takes beside its key and row: two byte objects, the dictionary's entry and its list node.
ENTRY_OVERHEAD = 240


class MemoryCache:
    """Rows by key, within ``capacity`` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self.evictions = 0  # since the start
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> bytes | None:
        """The row under ``key``, which is now the most recently used one."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: bytes) -> None:
        """Keep ``row``; what was under ``key`` is replaced, and as much is given up as does not fit any more."""
        known = self._rows.pop(key, None)
        if known is not None:
            self.bytes -= _size(key, known)
        if _size(key, row) > self.capacity:
            return
        self._rows[key] = row
        self.bytes += _size(key, row)
        while self.bytes > self.capacity:
            self.bytes -= _size(*self._rows.popitem(last=False))
            self.evictions += 1


def _size(key: bytes, row: bytes) -> int:
    return ENTRY_OVERHEAD + len(key) + len(row)
