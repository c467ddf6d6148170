"""Where the engine's thread spends its time: every moment of a step belongs to one stage, so they add up to it."""

from __future__ import annotations

import time

# In the order in which a step goes through them; those from "gate" to "combine" are a routed layer's.
STAGES = (
    "schedule",  # choose the step's sequences, and lay out their rows
    "attention",  # with its norms and projections, and feed-forwards that do not route
    "gate",
    "group",  # quantize the rows, and sort them by expert
    "encode",  # ask the cache of expert outputs, plan, build the frames, and send them
    "wire",  # waiting for workers that neither compute nor have the call in their queue
    "queue",  # waiting for the worker that takes longest, while the call waits there
    "compute",  # waiting for it while it computes
    "decode",  # check the replies, and put the rows into their places
    "combine",
    "head",  # the final norm, and the logits
    "sample",
    "report",  # tell the HTTP process
)
# Of the layers alone, and those in which the engine's thread waits.
LAYER_STAGES = STAGES[STAGES.index("attention") : STAGES.index("combine") + 1]
WAITS = ("wire", "queue", "compute")


class StageClock:
    """Seconds of each stage since the process began. Used by the engine's thread alone."""

    __slots__ = ("_last", "_taken", "seconds")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._taken = dict(self.seconds)
        self._last = time.perf_counter()

    def start(self) -> None:
        """What was before belongs to no stage: there was nothing to do."""
        self._last = time.perf_counter()

    def mark(self, stage: str) -> float:
        """All time since the last mark was ``stage``'s; returns it."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[stage] += spent
        return spent

    def take(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        before, self._taken = self._taken, dict(self.seconds)
        return {stage: seconds - before[stage] for stage, seconds in self._taken.items()}

    def waited(self, seconds: float, queue: float, compute: float) -> None:
        """Of ``seconds`` marked as "wire", so much was the worker's: what is left is the way there and back."""
        own = min(seconds, compute)
        waiting = min(seconds - own, queue)
        self.seconds["wire"] -= own + waiting
        self.seconds["compute"] += own
        self.seconds["queue"] += waiting
