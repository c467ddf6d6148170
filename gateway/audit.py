"""Whether two workers answer one frame with the same bits, and who is wrong where they do not. Pure; no I/O.

Letters: P pairs of the frame, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilium.frames import Frame
from gateway.worker import Worker, WorkerProcess

PATIENCE = 10.0  # seconds that the second answer may take after the frame was sent


@dataclass(slots=True, eq=False)
class Audit:
    """One frame that several workers of one numerics class compute."""

    frame: Frame
    asked: dict[str, WorkerProcess]  # by address, whether they have answered or not
    waiting: int = 1  # of them, those that have not answered
    answers: list[tuple[Worker, Tensor]] = field(default_factory=list)  # with their rows [P, D]
    releases: list[Callable[[], None]] = field(default_factory=list)

    def add(self, worker: Worker, rows: Tensor, release: Callable[[], None]) -> None:
        """An answer has come."""
        self.waiting -= 1
        self.answers.append((worker, rows))
        self.releases.append(release)

    @property
    def numerics_class(self) -> str:
        """Of all of them."""
        return next(iter(self.asked.values())).numerics_class

    @property
    def unsupported(self) -> bool:
        """Whether there is but one answer, and it has what is no number: so its worker or the model is damaged."""
        return len(self.answers) == 1 and not self.answers[0][1].isfinite().all()

    def release(self) -> None:
        """Nobody needs the rows any more."""
        releases, self.releases = self.releases, []
        for release in releases:
            release()

    def verdict(self, truth: Tensor | None = None) -> tuple[Tensor | None, list[Worker]]:
        """The rows [P, D] that are right, and who answered with others; ``truth`` is what they are, if that is known.

        Without it most are right, of those with finite numbers if there are any. No rows where that cannot be told.
        """
        if truth is None:
            all_rows = [rows for _, rows in self.answers]
            count = [rows for rows in all_rows if rows.isfinite().all()] or all_rows
            votes = [sum(_equal(rows, other) for other in count) for rows in count]
            if not 2 * max(votes) > len(votes):
                return None, []
            truth = count[votes.index(max(votes))]
        return truth, [worker for worker, rows in self.answers if not _equal(rows, truth)]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but for the bits of what is not a number."""
    bits = [torch.where(rows.isnan(), torch.zeros((), dtype=rows.dtype), rows).view(torch.uint8) for rows in (a, b)]
    return torch.equal(*bits) and torch.equal(a.isnan(), b.isnan())
