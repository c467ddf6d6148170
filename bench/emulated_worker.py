"""A worker that takes a fixed time for every frame, and little of the processor where the model is tiny.

`python -m bench.emulated_worker MILLISECONDS`, then the flags of `consilium expert`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

from torch import Tensor

from consilium.checkpoint import ExpertTensors
from consilium.experts import Arithmetic, ExpertWeights
from consilium.telemetry import setup_logging
from expert_service.__main__ import parse_arguments
from expert_service.server import Worker


class Sleeping:
    """An arithmetic that waits before it computes."""

    def __init__(self, right: Arithmetic, seconds: float) -> None:
        self._right, self._seconds = right, seconds
        self.row_dtype, self.reply_dtype, self.numerics_class = right.row_dtype, right.reply_dtype, right.numerics_class

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        return self._right.prepare(tensors)

    def compute(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        time.sleep(self._seconds)
        return self._right.compute(experts, offsets, rows, scales, out, indices)


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    config = parse_arguments(argv[1:])
    setup_logging("emulated", config.log.level)
    worker = Worker(config)
    worker.arithmetic = Sleeping(worker.arithmetic, float(argv[0]) / 1e3)
    asyncio.run(worker.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
