"""Which experts are in memory, and which one makes way: pure bookkeeping, no bytes and no threads.

Every expert has a score, LRFU's (Lee et al. 2001): each time it is asked for counts 1, and counts half after
``half_life``. So what is hot stays although it was not asked for just now, and what was asked for once leaves first.
Least recently used alone would keep nothing: a step goes through all layers, and what it asks for first is oldest when
the next step asks for it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


class Residency(Generic[Key]):
    """So many slots, and what is in each."""

    def __init__(self, slots: int, half_life: float) -> None:
        """``half_life`` is in calls of :meth:`touch`."""
        self._decay = 1 / half_life
        self._now = 0.0  # in half-lives
        self._scores: dict[Key, float] = {}  # log2 of the sum, as it would be had nothing decayed
        self._place: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * slots
        self._users: Counter[Key] = Counter()
        self._order = np.full(slots, -np.inf)  # score of what is in each slot, -inf where it is nothing that is held
        self._used = np.zeros(slots, bool)

    def __len__(self) -> int:
        """How many are in memory."""
        return len(self._place)

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def touch(self, keys: Iterable[Key]) -> None:
        """These are asked for now."""
        self._now += self._decay
        for key in keys:
            score = float(np.logaddexp2(self._scores.get(key, -np.inf), self._now))
            self._scores[key] = score
            if key in self._place:
                self._order[self._place[key]] = score

    def pin(self, key: Key) -> None:
        """It stays, once it is in memory, until it is unpinned as often."""
        self._users[key] += 1
        if key in self._place:
            self._used[self._place[key]] = True

    def unpin(self, key: Key) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            if key in self._place:
                self._used[self._place[key]] = False

    def take(self, key: Key) -> tuple[int, Key | None] | None:
        """A slot for ``key``, which is in none, and what was in it before; None while everything is pinned."""
        slot = int(np.where(self._used, np.inf, self._order).argmin())
        if self._used[slot]:
            return None
        former = self._keys[slot]
        if former is not None:
            del self._place[former]
        self._keys[slot], self._place[key] = key, slot
        self._order[slot], self._used[slot] = self._scores.get(key, -np.inf), key in self._users
        return slot, former

    def give_up(self, key: Key) -> None:
        """Its slot holds nothing."""
        slot = self._place.pop(key)
        self._keys[slot], self._order[slot], self._used[slot] = None, -np.inf, False

    def forget(self, key: Key) -> None:
        """It is not held any more: the first to make way."""
        self._scores.pop(key, None)
        if key in self._place:
            self._order[self._place[key]] = -np.inf
