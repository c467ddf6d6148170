"""A worker that takes a fixed time for every frame and none of the processor: many fit on few cores.

`python -m bench.emulated_worker MILLISECONDS`, then the flags of `consilium expert`. Experts answer with the rows they
get.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence

from torch import Tensor

from bench.echo_worker import Echo
from consilium.experts import ExpertWeights
from consilium.telemetry import setup_logging
from expert_service.__main__ import parse_arguments
from expert_service.server import Worker


class Sleeping(Echo):
    """An arithmetic that only waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

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
        return super().compute(experts, offsets, rows, scales, out, indices)


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    config = parse_arguments(argv[1:])
    setup_logging("emulated", config.log.level)
    worker = Worker(config)
    worker.arithmetic = Sleeping(float(argv[0]) / 1e3)
    asyncio.run(worker.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
