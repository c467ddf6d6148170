"""A worker whose experts answer with the rows they get: all of the service but the arithmetic. For bench.rpc alone.

`python -m bench.echo_worker` takes the flags of `consilium expert`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.checkpoint import ExpertTensors
from consilium.experts import ExpertWeights
from consilium.telemetry import setup_logging
from expert_service.__main__ import parse_arguments
from expert_service.server import Worker


class Echo:
    """An arithmetic that computes nothing."""

    row_dtype = reply_dtype = torch.float32
    numerics_class = "echo"

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        return ExpertWeights(*tensors.floats())

    def compute(
        self,
        experts: Sequence[ExpertWeights],  # noqa: ARG002 (the protocol's)
        offsets: Sequence[int],  # noqa: ARG002
        rows: Tensor,
        scales: Tensor | None,  # noqa: ARG002
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        if out is None:
            return rows if indices is None else rows[indices]
        return out.copy_(rows) if indices is None else torch.index_select(rows, 0, indices, out=out)


def main() -> int:
    """Exit status."""
    config = parse_arguments(sys.argv[1:])
    setup_logging("echo", config.log.level)
    worker = Worker(config)
    worker.arithmetic = Echo()
    asyncio.run(worker.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
