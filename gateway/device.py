"""Where the gateway computes: on the CPU, or on a GPU where there is one that serves the model."""

from __future__ import annotations

import importlib.util
import logging

import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.errors import ConfigError
from consilium.model_config import ModelConfig
from consilium.wire import ROW_DTYPES
from gateway.arithmetic import dense_quantization, find_arithmetic
from gateway.engine_model import EngineModel
from gateway.expert_meter import ExpertMeter
from gateway.gate_policy import find_policy
from gateway.kv_cache import KVPool, Pool
from gateway.local_experts import local_experts
from gateway.model import Model
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource

log = logging.getLogger(__name__)

FAMILIES = ("mixtral", "olmoe", "qwen3_moe")  # that kernels for GPUs know


def uses_gpu(config: Config, model: ModelConfig) -> bool:
    """Whether a GPU computes. Raises ConfigError where one is asked for and cannot."""
    wanted = config.gateway.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return False
    reason = find_refusal(config, model) or _missing()
    if reason is None:
        return True
    if wanted == "cuda":
        raise ConfigError(f"gateway.device: cuda {reason}, or choose --device cpu")
    log.info("attention is computed on the CPU, for a GPU %s", reason)
    return False


def find_refusal(config: Config, model: ModelConfig) -> str | None:
    """What of the deployment a GPU cannot serve, and what to do; None where it can."""
    if model.family not in FAMILIES:
        return f"does not know {model.family} models, only {', '.join(FAMILIES)}; serve one of these"
    if config.quantization != "int8" or dense_quantization(config) != "int8":
        return "computes in int8 alone; leave quantization and gateway.dense_quantization at int8"
    if find_policy(config.gateway, model) is not None:
        return "knows no policies of gates; leave gateway.adaptive_k and gateway.capacity_factor out"
    return None


def make_model(
    config: Config, checkpoint: Checkpoint, experts: ExpertSource, clock: StageClock, meter: ExpertMeter
) -> tuple[EngineModel, Pool]:
    """The model as it is served, with its memory for keys and values. Raises ConsiliumError."""
    if uses_gpu(config, checkpoint.config):
        from gateway.gpu.setup import make_device_model  # Triton is there with GPUs only

        return make_device_model(config, checkpoint, experts, clock, meter, torch.device("cuda"))
    if config.gateway.local_experts:
        experts = local_experts(config, checkpoint)
    pool = KVPool(checkpoint.config, ROW_DTYPES[config.dtype], config.gateway.kv_cache_memory)
    arithmetic, policy = find_arithmetic(config, checkpoint.config), find_policy(config.gateway, checkpoint.config)
    return Model(checkpoint, arithmetic, experts, clock, policy), pool


def _missing() -> str | None:
    """What this machine lacks, and what to do."""
    if not torch.cuda.is_available():
        return "is not there, or torch does not see it; look at nvidia-smi"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton; install torch for CUDA"
    return None
