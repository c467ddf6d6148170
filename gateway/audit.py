"""Whether two workers answer one frame with the same bits, and who is wrong where they do not. Pure; no I/O.

Letters: P pairs of the frame, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilium.frames import Frame
from gateway.worker import Worker

PATIENCE = 2.0  # seconds that the second answer may take after the frame was sent


@dataclass(slots=True, eq=False)
class Audit:
    """One frame that several workers of one numerics class compute."""

    frame: Frame
    waiting: int = 0  # workers that have been asked and have not answered
    asked: set[str] = field(default_factory=set)  # addresses
    answers: list[tuple[Worker, Tensor]] = field(default_factory=list)  # with their rows [P, D]
    releases: list[Callable[[], None]] = field(default_factory=list)

    def add(self, worker: Worker, rows: Tensor, release: Callable[[], None]) -> None:
        """An answer has come."""
        self.waiting -= 1
        self.answers.append((worker, rows))
        self.releases.append(release)

    def release(self) -> None:
        """Nobody needs the rows any more."""
        for release in self.releases:
            release()

    def verdict(self, truth: Tensor | None = None) -> tuple[Tensor | None, list[Worker]]:
        """The rows [P, D] that are right, and who answered with others; ``truth`` is what they are, if that is known.

        Without it most are right. No rows where that cannot be told.
        """
        if truth is None:
            votes = [sum(_equal(rows, other) for _, other in self.answers) for _, rows in self.answers]
            if not 2 * max(votes) > len(votes):
                return None, []
            truth = self.answers[votes.index(max(votes))][1]
        return truth, [worker for worker, rows in self.answers if not _equal(rows, truth)]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit by bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
