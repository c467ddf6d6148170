"""Counts what the cache did, and when to report it. Belongs to the engine's thread."""

from __future__ import annotations

import time

from gateway.messages import CacheStats, TierStats

REPORT_INTERVAL = 1.0  # seconds between reports


class CacheMeter:
    """Counts since the last report."""

    def __init__(self) -> None:
        self._stats = CacheStats()
        self._touched = False
        self._next_report = 0.0  # on time.monotonic's clock

    def looked_up(self, tier: str, found: int, missing: int, seconds: float) -> None:
        """One lookup in one level."""
        stats = self._stats.tiers.setdefault(tier, TierStats())
        stats.hits += found
        stats.misses += missing
        stats.lookups += 1
        stats.seconds += seconds
        self._touched = True

    def failed(self, operation: str, kind: str, count: int = 1) -> None:
        """An attempt to reach Redis, or a value in it, was wrong."""
        if count:
            kinds = self._stats.errors.setdefault(operation, {})
            kinds[kind] = kinds.get(kind, 0) + count
            self._touched = True

    def written(self, rows: int) -> None:
        """So many rows are in Redis now."""
        self._stats.written += rows
        self._touched = True

    def dropped(self, rows: int) -> None:
        """So many rows were not written."""
        self._stats.dropped += rows
        self._touched = True

    def touch(self) -> None:
        """Something that the report tells has changed."""
        self._touched = True

    def due_in(self) -> float | None:
        """Seconds until there is something to report; None while there is nothing."""
        return max(0.0, self._next_report - time.monotonic()) if self._touched else None

    def take(self) -> CacheStats | None:
        """The counts since the last report, if that is due."""
        if self.due_in() != 0.0:
            return None
        stats, self._stats = self._stats, CacheStats()
        self._touched = False
        self._next_report = time.monotonic() + REPORT_INTERVAL
        return stats
