"""What the engine asks of a model, wherever it is computed.

Letters: T rows of the step, D hidden size, V vocabulary, S sequences that get a token.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from torch import Tensor

from gateway.batch import Segment, StepRows
from gateway.gate_policy import GatePolicy
from gateway.mailbox import Awaited
from gateway.placement import Placement
from gateway.sequence import Sequence
from gateway.stage_clock import StageClock
from gateway.worker_connection import WorkerConnection


class EngineModel(Protocol):
    """Everything between token ids and the next tokens."""

    clock: StageClock
    policy: GatePolicy | None

    def follow(self, placement: Placement, workers: Mapping[str, WorkerConnection]) -> None:
        """The dispatcher asks these workers from now on; some may be reached in other ways, too."""
        ...

    def batch(self, tokens: list[int], segments: list[Segment]) -> StepRows:
        """The rows of one step; ``tokens`` are those of the segments, one after the other."""
        ...

    def forward(self, batch: Any) -> Coroutine[Awaited, None, Tensor]:
        """Hidden states [T, D] of a batch of its own, after the final norm."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[S, D] -> [S, V] float32."""
        ...

    def choose(self, logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
        """The next token of each sequence from its logits [S, V]; -1 where they are not finite."""
        ...
