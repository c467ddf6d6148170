"""The sequences that wait to be admitted: by priority, then by each client's fair share, then by arrival."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from gateway.fair_share import Client, FairShare
from gateway.sequence import Sequence


class WaitingQueue:
    """Every waiting sequence, in a line for each client and priority."""

    def __init__(self, shares: FairShare) -> None:
        self._shares = shares
        self._lines: dict[int, dict[Client, list[Sequence]]] = {}  # by priority, then client; each by arrival
        self._waiting: dict[Client, int] = {}  # how many of each client

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no particular order between clients."""
        for lines in self._lines.values():
            for line in lines.values():
                yield from line

    def add(self, sequence: Sequence) -> None:
        """Put a sequence where its arrival places it: one that had to give way stands before its client's others."""
        client = sequence.client
        if client not in self._waiting:
            self._shares.arrive(client, self._waiting)
        self._waiting[client] = self._waiting.get(client, 0) + 1
        line = self._lines.setdefault(sequence.priority, {}).setdefault(client, [])
        insort(line, sequence, key=lambda each: each.arrival)

    def remove(self, sequence: Sequence) -> None:
        lines, client = self._lines[sequence.priority], sequence.client
        lines[client].remove(sequence)
        if not lines[client]:
            del lines[client]
        if not lines:
            del self._lines[sequence.priority]
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client]
            self._shares.leave(client, self._waiting)

    def candidates(self, count: int) -> Iterator[Sequence]:
        """The first in order, ``count`` at most. Nothing may be added or removed meanwhile."""
        for priority in sorted(self._lines):
            lines = self._lines[priority]
            clients = heapq.nsmallest(count, lines, key=lambda each: (self._shares.rank(each), lines[each][0].arrival))
            for client in clients:
                for sequence in lines[client][:count]:
                    yield sequence
                    count -= 1
                    if not count:
                        return
