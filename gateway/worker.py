"""What the dispatcher asks of a worker, whatever the way to it, and what a worker answers.

Letters: P pairs of one frame, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from consilium.frames import Frame
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.mailbox import Completion


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer to one frame, with what it took."""

    # The rows [P, D] for P, D and their dtype; raises WireError when they are not that.
    rows: Callable[[int, int, torch.dtype], Tensor]
    queue_us: int
    compute_us: int
    round_trip: float  # seconds
    bytes_sent: int
    bytes_received: int
    release: Callable[[], None] = lambda: None  # of the memory that the rows lie in


class WorkerProcess(NamedTuple):
    """Who answers at an address, until it is started anew."""

    identity: str
    numerics_class: str


NOT_KNOWN = WorkerProcess("", "")


class Worker(Protocol):
    """A connected worker, whatever the transport."""

    group: str
    address: str

    @property
    def identity(self) -> str:
        """Of its process: another one after it was started again."""
        ...

    @property
    def numerics_class(self) -> str:
        """Equal for workers that answer with the same bits."""
        ...

    @property
    def local_link(self) -> bool:
        """Whether it is on this host, reached without gRPC."""
        ...

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        """Start one call that is given up at ``deadline`` (monotonic clock); a failure is set as its outcome."""
        ...

    def time_limit(self, pairs: int) -> float:
        """Seconds that one attempt with so many pairs may take."""
        ...


class ExpertSource(Protocol):
    """Where the outputs of experts come from."""

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """The output rows of ``batches.slots``, until they are released, and why rows (by index) have none."""
        ...
