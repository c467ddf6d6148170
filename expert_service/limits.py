"""How many experts `worker.memory_limit` leaves room for."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.errors import ConfigError
from consilium.experts import Arithmetic, ExpertWeights, compute_expert
from consilium.model_config import ModelConfig
from consilium.quantization import quantize_rows
from consilium.units import format_size
from expert_service.device import WorkerDevice
from expert_service.expert_memory import LimitedMemory
from expert_service.paged_expert import largest_room

logger = logging.getLogger(__name__)

# So many largest frames are kept free for calls and their results: one that is computed, and one that comes or leaves.
CALL_FRAMES = 2
FEWEST_SLOTS = 2  # one to compute with while the other one is read


def check_limit(device: WorkerDevice, checkpoint: Checkpoint | None) -> Checkpoint:
    """The checkpoint that experts can be left in. Raises ConfigError where there is none, or they go to a GPU."""
    if device.memory() is not None:
        raise ConfigError(
            "worker.memory_limit: a GPU's experts are all in its memory; bound what the router gives this worker with "
            "worker.memory instead, or choose --device cpu"
        )
    if checkpoint is None:
        raise ConfigError(
            "worker.memory_limit: experts can stay on disk only where the model is on this machine; name it with "
            "--model, or bound what the router gives this worker with worker.memory instead"
        )
    return checkpoint


def limited_memory(
    config: Config, model: ModelConfig, arithmetic: Arithmetic, layout: ExpertWeights, to_come: int
) -> LimitedMemory:
    """Slots for what `worker.memory_limit` leaves beside the process as it is now.

    ``to_come`` is how many experts it may hold later beyond those it has now: a little of each stays in memory. Raises
    ConfigError where too little is left.
    """
    limit = config.worker.memory_limit
    assert limit is not None
    room = largest_room(layout)
    small = sum(tensor.nbytes for tensor in layout.tensors() if tensor.dim() < 2)  # scales and biases are not on disk
    _warm_up(arithmetic, layout, model.hidden_size)
    taken = resident_bytes() + CALL_FRAMES * config.worker.max_frame + to_come * small
    layers = len(model.expert_layers())
    slots = min((limit - taken) // room, layers * model.num_experts)
    if slots < FEWEST_SLOTS:
        raise ConfigError(
            f"worker.memory_limit: {format_size(limit)} is too little: the process takes {_mib(resident_bytes())} by "
            f"itself, calls up to {_mib(CALL_FRAMES * config.worker.max_frame)} (worker.max_frame) and two experts "
            f"{_mib(FEWEST_SLOTS * room)}; give it {_mib(taken + FEWEST_SLOTS * room)} or more"
        )
    logger.info("memory for %d experts, %.1f MiB; the others are read from disk", slots, slots * room / 2**20)
    return LimitedMemory(slots, room, layers)


def resident_bytes() -> int:
    """Of this process, with mapped files and shared memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _warm_up(arithmetic: Arithmetic, layout: ExpertWeights, hidden_size: int) -> None:
    """Have every kernel compiled, and its threads started: they take memory, too."""
    for rows in (1, 256):
        x = torch.ones(rows, hidden_size)
        inputs = quantize_rows(x) if arithmetic.row_dtype == torch.int8 else (x.to(arithmetic.row_dtype), None)
        compute_expert(arithmetic, layout, *inputs)


def _mib(nbytes: int) -> str:
    return f"{-(-nbytes // 2**20)}MiB"
