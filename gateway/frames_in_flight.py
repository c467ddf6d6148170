"""The frames of one layer that have been sent and not been answered: who is asked for which experts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium.errors import ConsiliumError
from gateway.attempt import Attempt
from gateway.batches import ExpertBatches
from gateway.crew import Crew
from gateway.framing import PIECE_BYTES, build_frame, in_turn, split
from gateway.placement import Plan
from gateway.work import Kind
from gateway.worker import Worker


class FramesInFlight:
    """Positions are those in ``batches.experts``."""

    __slots__ = ("_batches", "_crew", "_layer", "_row_bytes", "choice", "deadline", "excluded", "open")

    def __init__(self, crew: Crew, layer: int, batches: ExpertBatches, row_bytes: int) -> None:
        """``row_bytes`` is what a row takes that comes back."""
        self.open: dict[Attempt, None] = {}  # in the order in which they were sent
        self.deadline = time.monotonic() + crew.config.layer_timeout
        self.choice = crew.placement.of_layer(layer).replicated  # whether somebody else could be asked at all
        self.excluded: dict[str, ConsiliumError] = {}  # those that are not asked again, and why
        self._crew, self._layer, self._batches, self._row_bytes = crew, layer, batches, row_bytes

    def plan(self, wanted: Sequence[int] | None, but: Collection[str] = ()) -> tuple[Plan, list[int]]:
        """Who is to be asked for these positions (None is all), ``but`` these; and the positions that nobody can take.

        Whoever is excluded gets none.
        """
        excluded = {*self.excluded, *but} if but else self.excluded
        return self._crew.plan(self._layer, self._batches, wanted, excluded)

    def send(self, plan: Plan, kind: Kind) -> list[Attempt]:
        """Send everybody its part."""
        before = Counter[str]()  # pairs that each has been sent
        attempts = []
        for address, positions in self._pieces(plan):
            frame, pairs = build_frame(self._layer, self._batches, positions)
            before[address] += len(pairs)
            worker = self._crew.workers[address]
            attempts.append(self._ask(Attempt(kind, worker, frame, positions, pairs, before[address])))
        return attempts

    def send_again(self, attempt: Attempt, worker: Worker, kind: Kind) -> Attempt:
        """Send the same frame to one more worker."""
        return self._ask(
            Attempt(kind, worker, attempt.frame, attempt.positions, attempt.pairs, len(attempt.pairs)), choice=True
        )

    def asked_for(self) -> set[int]:
        """The positions of all that are open."""
        return {position for each in self.open for position in each.positions.tolist()}

    def leave(self) -> None:
        """Nobody waits for any of them."""
        while self.open:
            self._crew.leave(self.open.popitem()[0])

    def _ask(self, attempt: Attempt, *, choice: bool = False) -> Attempt:
        self._crew.send(attempt, self.deadline, choice=choice or self.choice)
        self.open[attempt] = None
        return attempt

    def _pieces(self, plan: Plan) -> Iterable[tuple[str, NDArray[np.int64]]]:
        """Addresses with the positions of one frame each; nothing travels over local links, so theirs stay whole."""
        most = max(1, PIECE_BYTES // self._row_bytes)
        if len(self._batches.slots) <= most:
            return plan.items()
        counts, workers = self._batches.counts, self._crew.workers
        return in_turn(
            {
                address: [positions] if workers[address].local_link else split(positions, counts, most)
                for address, positions in plan.items()
            }
        )
