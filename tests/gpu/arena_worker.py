"""A worker that computes whole steps without a GPU: `python -m tests.gpu.arena_worker FAULT`, then a worker's flags.

All of it is the real service, with kernels in Triton's interpreter and the arena in the CPU's memory; only the experts
between two flags are computed by the CPU's arithmetic. FAULT is a file; while it has a fault's name in it the worker is
"silent" (its kernels wait for ever), "stopped" (it sends itself SIGSTOP) or "killed" in the middle of a step.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined

from consilium.experts import Arithmetic
from consilium.model_config import ModelConfig
from consilium.telemetry import setup_logging
from expert_service.__main__ import parse_arguments
from expert_service.layer_kernels import LayerKernels
from expert_service.server import Worker
from expert_service.store import ExpertStore

FAULTY_LAYER = 1


class HostKernels:
    """The experts of a layer between the flags of a step, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, store: ExpertStore, arithmetic: Arithmetic, model: ModelConfig, fault: Path) -> None:
        self.layers, experts, hidden_size = list(model.expert_layers()), model.num_experts, model.hidden_size
        self._store, self._arithmetic, self._experts, self._fault = store, arithmetic, experts, fault
        for layer in self.layers[:1]:  # a step does not wait for what the CPU's kernels need at their first call
            weights = list(store.held(layer).values())[:1]
            rows = torch.zeros(1, hidden_size, dtype=torch.int8)
            arithmetic.compute(weights, [0, 1], rows, torch.ones(1), indices=torch.zeros(1, dtype=torch.int32))

    def refresh(self) -> None:
        """The table is made anew every time."""

    def table(self, layer: int) -> Tensor:
        found = torch.zeros(self._experts, 1, dtype=torch.int64)
        found[list(self._store.hashes.get(layer, {}))] = 1
        return found

    def launch(self, layer: int, rows: Tensor, scales: Tensor | None, ids: Tensor, out: Tensor) -> None:
        if layer == FAULTY_LAYER and bool((ids >= 0).any()):
            self._fail()
        experts, counts = ids[ids >= 0].unique(return_counts=True)
        if len(experts):
            pairs = ids.argsort(stable=True)[-int(counts.sum()) :]
            offsets = [0, *counts.cumsum(0).tolist()]
            indices = (pairs // (len(ids) // len(rows))).to(torch.int32)
            held = self._store.held(layer)
            weights = [held[expert] for expert in experts.tolist()]
            out[pairs] = self._arithmetic.compute(weights, offsets, rows, scales, indices=indices)

    def _fail(self) -> None:
        fault = self._fault.read_text() if self._fault.exists() else ""
        if fault == "silent":
            threading.Event().wait()
        elif fault:
            os.kill(os.getpid(), signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)


class ArenaWorker(Worker):
    fault: Path

    def layer_kernels(self) -> LayerKernels:
        return HostKernels(self.store, self.arithmetic, self.model, self.fault)


def main(argv: Sequence[str]) -> None:
    ArenaWorker.fault = Path(argv[0])
    config = parse_arguments(argv[1:])
    setup_logging(f"expert/{config.worker.group}", config.log.level)
    asyncio.run(ArenaWorker(config).serve())


if __name__ == "__main__":
    main(sys.argv[1:])
