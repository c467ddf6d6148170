"""One frame on its way to one worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from consilium.frames import Frame
from gateway.audit import Audit
from gateway.mailbox import Completion
from gateway.work import Kind
from gateway.worker import NOT_KNOWN, Reply, Worker, WorkerProcess


@dataclass(slots=True, eq=False)
class Attempt:
    """What is asked of whom, and why. Times are on time.monotonic's clock."""

    kind: Kind
    worker: Worker
    frame: Frame
    positions: NDArray[np.int64]  # of its experts, in ExpertBatches
    pairs: NDArray[np.int64]  # that it covers [P]
    rows: int  # with those of frames before it, which it waits for
    call: Completion[Reply] = field(init=False)  # from when it is sent
    process: WorkerProcess = NOT_KNOWN  # that it was sent to
    sent: float = 0.0
    size: int = 0  # for the fleet; 0 where nothing can be chosen
    act_at: float = inf  # when somebody else is asked
    hung_at: float = inf
    audit: Audit | None = None
