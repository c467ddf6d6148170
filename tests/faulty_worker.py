"""A worker with the fault that a file names, while there is one: `python -m tests.faulty_worker FILE`, then its flags.

All of it is the real service; the fault is in what it answers.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from consilium.checkpoint import ExpertTensors
from consilium.experts import Arithmetic, ExpertWeights
from consilium.link_packets import pack_result
from consilium.telemetry import setup_logging
from expert_service import local_link, stream
from expert_service.__main__ import parse_arguments
from expert_service.server import Worker

LATE = 0.25  # seconds


class Faulty:
    """The arithmetic of a worker, with wrong results while the file says so."""

    def __init__(self, right: Arithmetic, file: Path) -> None:
        self._right, self._file = right, file
        self.row_dtype, self.reply_dtype, self.numerics_class = right.row_dtype, right.reply_dtype, right.numerics_class
        self._last: Tensor | None = None  # rows of the call before

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
        found = self._right.compute(experts, offsets, rows, scales, out, indices)
        last, self._last = self._last, found.clone()
        fault = named(self._file)
        if fault == "late":
            time.sleep(LATE)
        elif fault == "nan":
            found[-1, 0] = float("nan")
        elif fault == "wrong":  # one bit of one number
            found.view(torch.int16 if found.itemsize == 2 else torch.int32)[-1, 0] ^= 1
        elif fault == "another" and last is not None:  # rows of another call
            found.copy_(last[torch.arange(len(found)) % len(last)])
        return found


def named(file: Path) -> str:
    """The fault that the worker is to have now."""
    return file.read_text() if file.exists() else ""


def answer_garbage(file: Path) -> None:
    """On demand, have local links answer with packets that are none, and streams with bytes that are none."""
    right = stream.ForwardStream.run

    def packet(call_id: int, queue_us: int, compute_us: int) -> bytes:
        return bytes(24) if named(file) == "garbage" else pack_result(call_id, queue_us, compute_us)

    async def run(self: stream.ForwardStream, requests: object, write: object) -> None:
        async def garbled(response: bytes) -> None:
            await write(b"\xff" * len(response) if named(file) == "garbage" else response)  # type: ignore[operator]

        await right(self, requests, garbled)  # type: ignore[arg-type]

    setattr(local_link, "pack_result", packet)  # noqa: B010 (not the module's own name)
    stream.ForwardStream.run = run  # type: ignore[method-assign]


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    file = Path(argv[0])
    config = parse_arguments(argv[1:])
    setup_logging("faulty", config.log.level)
    worker = Worker(config)
    answer_garbage(file)
    worker.arithmetic = Faulty(worker.arithmetic, file)
    asyncio.run(worker.serve())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
