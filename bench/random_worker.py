"""A worker whose experts are random numbers made on its GPU: `python -m bench.random_worker`, then a worker's flags.

It is the real service in all else. To make the experts of a large shape on the CPU, and to hash them, takes minutes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import torch

from consilium.checkpoint import Checkpoint
from consilium.content_hash import HASH_BYTES
from consilium.experts import ExpertWeights
from consilium.gpu.experts import ExpertForm, form_of
from consilium.gpu.jit import INTERPRETED
from consilium.gpu.samples import random_layer
from consilium.telemetry import setup_logging
from expert_service.__main__ import parse_arguments
from expert_service.server import Worker
from expert_service.sources import HeldSource


class RandomWeights:
    """Other numbers for each expert, the same in every process."""

    def __init__(self, form: ExpertForm) -> None:
        self._form, self._device = form, torch.device("cpu" if INTERPRETED else "cuda")

    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        """Its hash only says which one it is."""
        number = layer << 16 | expert
        return random_layer(self._form, 1, self._device, number).experts[0], number.to_bytes(HASH_BYTES, "big")


class RandomWorker(Worker):
    def _source(self, checkpoint: Checkpoint | None) -> HeldSource:
        del checkpoint
        return RandomWeights(form_of(self.layout, self.arithmetic.row_dtype, self.arithmetic.reply_dtype))


def main(argv: Sequence[str]) -> None:
    config = parse_arguments(argv)
    setup_logging(f"expert/{config.worker.group}", config.log.level)
    asyncio.run(RandomWorker(config).serve())


if __name__ == "__main__":
    main(sys.argv[1:])
