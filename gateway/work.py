"""What workers did for this gateway, counted at every frame, and how long a layer waited for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from gateway.messages import EXPERT_CALL_ROWS, WorkerStats
from gateway.worker import Reply, Worker

# Why a frame is sent: at first, because another worker failed, or is late, or to compare with another's answer.
Kind = Enum("Kind", ["FIRST", "RETRY", "HEDGE", "AUDIT"])


@dataclass(slots=True)
class Waits:
    """How long one layer waited for its workers, and what the one that took longest says of it."""

    seconds: float = 0.0
    queue_us: int = 0
    compute_us: int = 0

    def add(self, reply: Reply) -> None:
        if reply.queue_us + reply.compute_us > self.queue_us + self.compute_us:
            self.queue_us, self.compute_us = reply.queue_us, reply.compute_us


@dataclass(slots=True)
class Work:
    """What one worker did, counted at every frame; a plain class, for it is on the token path."""

    group: str
    frames: int = 0
    rows: int = 0
    failures: int = 0
    failovers: int = 0
    hedges: int = 0
    late: int = 0
    audits: int = 0
    lies: int = 0
    ejections: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    queue_us: int = 0
    compute_us: int = 0
    wire_seconds: float = 0.0
    expert_calls: list[NDArray[np.int64]] = field(default_factory=list)  # rows of each expert in each frame

    def sent_as(self, kind: Kind) -> None:
        """Count a frame that was sent for a reason."""
        self.failovers += kind is Kind.RETRY
        self.hedges += kind is Kind.HEDGE
        self.audits += kind is Kind.AUDIT

    def add(self, reply: Reply, rows: int) -> None:
        """Count one frame of so many rows."""
        queue_us, compute_us = reply.queue_us, reply.compute_us
        self.frames += 1
        self.rows += rows
        self.bytes_sent += reply.bytes_sent
        self.bytes_received += reply.bytes_received
        self.queue_us += queue_us
        self.compute_us += compute_us
        self.wire_seconds += max(0.0, reply.round_trip - (queue_us + compute_us) / 1e6)

    def stats(self, address: str) -> WorkerStats:
        """As the HTTP process takes it."""
        calls = list[int]()
        if self.expert_calls:  # of a whole step at once: each call costs more than the rows
            buckets = np.searchsorted(EXPERT_CALL_ROWS, np.concatenate(self.expert_calls))
            calls = np.bincount(buckets, minlength=len(EXPERT_CALL_ROWS) + 1).tolist()
        return WorkerStats(
            self.group,
            address,
            frames=self.frames,
            rows=self.rows,
            failures=self.failures,
            failovers=self.failovers,
            hedges=self.hedges,
            late=self.late,
            audits=self.audits,
            lies=self.lies,
            ejections=self.ejections,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            queue_seconds=self.queue_us / 1e6,
            compute_seconds=self.compute_us / 1e6,
            wire_seconds=self.wire_seconds,
            expert_calls=calls,
        )


class WorkBook:
    """The same for all workers, by address."""

    def __init__(self) -> None:
        self._works: dict[str, Work] = {}

    def of(self, worker: Worker) -> Work:
        """Where to count what it does."""
        work = self._works.get(worker.address)
        if work is None:
            work = self._works[worker.address] = Work(worker.group)
        return work

    def take(self) -> list[WorkerStats]:
        """What each worker did since the last call."""
        works, self._works = self._works, {}
        return [each.stats(address) for address, each in works.items()]
