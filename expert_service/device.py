"""Where a worker's experts lie and are computed: in the machine's memory, or on a GPU."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from consilium.arithmetics import find_arithmetic
from consilium.config import Config
from consilium.errors import ConfigError
from consilium.experts import Arithmetic, ExpertWeights
from consilium.model_config import ModelConfig
from expert_service.layer_kernels import LayerKernels
from expert_service.store import ExpertStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of a GPU, in bytes, whoever uses it."""

    total: int
    free: int


class WorkerDevice(Protocol):
    """What a worker computes on."""

    @property
    def name(self) -> str:
        """As Describe says it: cpu or cuda."""

    @property
    def arithmetic(self) -> Arithmetic:
        """For weights that were placed, on one thread."""

    @property
    def busy_seconds(self) -> float:
        """Time that a GPU was busy with calls."""

    def place(self, weights: ExpertWeights) -> ExpertWeights:
        """The expert where it is computed with. Raises Overloaded where there is no memory for it."""

    def memory(self) -> DeviceMemory | None:
        """None where it is the machine's own."""

    def samples(self, layout: ExpertWeights) -> tuple[Arithmetic, Sequence[ExpertWeights]]:
        """To see how fast it is: placed experts like ``layout`` to ask at once, while others use ``arithmetic``."""

    def layer_kernels(self, store: ExpertStore, model: ModelConfig) -> LayerKernels | None:
        """What whole steps need of the experts in ``store``; None where they are computed frame by frame only."""


class Cpu:
    """Weights stay where the checkpoint has them mapped."""

    name, busy_seconds = "cpu", 0.0

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic = arithmetic

    def place(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def memory(self) -> DeviceMemory | None:
        return None

    def samples(self, layout: ExpertWeights) -> tuple[Arithmetic, Sequence[ExpertWeights]]:
        return self.arithmetic, [layout]

    def layer_kernels(self, store: ExpertStore, model: ModelConfig) -> LayerKernels | None:  # noqa: ARG002
        return None


def find_device(config: Config, model: ModelConfig) -> WorkerDevice:
    """What ``worker.device`` says, its kernels proved. Raises ConsiliumError that says what is missing or wrong."""
    host = find_arithmetic(config.quantization, config.reply_dtype, model.hidden_size, model.expert_size)
    wanted = config.worker.device
    if config.quantization == "int4" and wanted == "cuda":
        raise ConfigError("worker.device: GPUs do not compute int4 yet; choose --device cpu, or --quantization int8")
    if config.quantization == "int4" and wanted == "auto" and torch.cuda.is_available():
        logger.warning("computing on the CPU although there is a GPU: GPUs do not compute int4 yet")
        return Cpu(host)
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return Cpu(host)
    if importlib.util.find_spec("triton") is None:
        if wanted == "cuda":
            raise ConfigError("worker.device: cuda needs Triton; install torch for CUDA, or choose --device cpu")
        logger.warning("computing on the CPU although there is a GPU: Triton is not installed")
        return Cpu(host)
    from expert_service.cuda_device import CudaDevice  # Triton is there with GPUs only

    return CudaDevice(host, model)
