"""A GPU that holds and computes a worker's experts.

Under Triton's interpreter (tests) the same code runs with tensors of the CPU, and there is no limit to its memory.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from consilium.errors import ConfigError, Overloaded
from consilium.experts import Arithmetic, ExpertWeights
from consilium.gpu.experts import form_of
from consilium.gpu.jit import INTERPRETED
from consilium.gpu.tuned import device_name, float_class, tilings_for
from consilium.gpu.upload import Uploader
from consilium.model_config import ModelConfig
from consilium.units import format_size
from expert_service.device import DeviceMemory
from expert_service.device_arithmetic import DeviceArithmetic
from expert_service.device_kernels import DeviceKernels
from expert_service.device_proof import prove
from expert_service.layer_kernels import LayerKernels
from expert_service.sources import blank_weights
from expert_service.store import ExpertStore

logger = logging.getLogger(__name__)

SAMPLES = 16  # experts: together larger than what a GPU keeps in its level-2 cache


class CudaDevice:
    """The first GPU that the process sees."""

    name = "cuda"

    def __init__(self, host: Arithmetic, model: ModelConfig) -> None:
        """``host`` is the arithmetic of the CPU, which the kernels are held against. Raises ConsiliumError."""
        if not (torch.cuda.is_available() or INTERPRETED):
            raise ConfigError("worker.device: cuda, but torch sees no GPU; choose --device cpu, or look at nvidia-smi")
        self._device = torch.device("cpu" if INTERPRETED else "cuda")
        self._uploader, self._lock = Uploader(self._device), threading.Lock()
        self._host, layout = host, blank_weights(host, model)
        self._form = form_of(layout, host.row_dtype, host.reply_dtype)
        self._tilings = tilings_for(self._form, self._device)
        self.arithmetic = self._arithmetic()
        prove(host, self._form, self._tilings, self._device, self.place)
        logger.info("experts on %s, whose kernels were held against the CPU's", device_name(self._device))

    @property
    def busy_seconds(self) -> float:
        return self.arithmetic.device_seconds

    def place(self, weights: ExpertWeights) -> ExpertWeights:
        with self._lock:
            try:
                return self._uploader.upload(weights)
            except torch.OutOfMemoryError:
                raise Overloaded(
                    f"no memory for one more expert on {self._room()}; let this worker hold fewer"
                ) from None

    def memory(self) -> DeviceMemory | None:
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return DeviceMemory(total, free)

    def samples(self, layout: ExpertWeights) -> tuple[Arithmetic, Sequence[ExpertWeights]]:
        return self._arithmetic(), [self.place(layout) for _ in range(1 if INTERPRETED else SAMPLES)]

    def layer_kernels(self, store: ExpertStore, model: ModelConfig) -> LayerKernels | None:
        layers, experts = model.expert_layers(), model.num_experts
        return DeviceKernels(store, self._form, self._tilings, self._device, layers, experts)

    def _arithmetic(self) -> DeviceArithmetic:
        """With lanes of its own."""
        integers = self._form.rows is torch.int8
        # Integers have the bits of the CPU, which is proved; sums of floats have an order of their own.
        kind = self._host.numerics_class if integers else float_class(self._form, self._tilings, self._device)
        return DeviceArithmetic(self._host, self._form, self._tilings, self._device, kind)

    def _room(self) -> str:
        memory, name = self.memory(), device_name(self._device)
        return name if memory is None else f"{name} ({format_size(memory.free)} of {format_size(memory.total)} free)"
