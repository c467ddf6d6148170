"""A model on a GPU from a deployment's configuration, its integer products proved first."""

from __future__ import annotations

import logging

import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Config
from consilium.errors import ConfigError
from consilium.gpu.linear import TILES, linear
from consilium.gpu.quantize import quantize_rows
from consilium.quantization import Quantized
from consilium.units import format_size
from consilium.wire import ROW_DTYPES
from gateway.arithmetic import dense_shapes
from gateway.device_hops import DeviceHops
from gateway.expert_meter import ExpertMeter
from gateway.gpu.experts import DispatchedExperts, ExpertHalf, load_experts
from gateway.gpu.model import DeviceModel
from gateway.gpu.pages import PagePool
from gateway.gpu.tiling import FAST, INVARIANT
from gateway.stage_clock import StageClock
from gateway.worker import ExpertSource

log = logging.getLogger(__name__)

ARENA_SECONDS = 2.0  # most that a worker on a GPU is waited for within a layer
PAGE_DTYPE = torch.bfloat16  # whatever ``dtype`` says: what matrix units multiply fast
KV_SHARE = 0.85  # of the memory that is free once the model is there; the rest is for what a step computes
PROVED_ROWS = [1, *(most + 1 for most in sorted(TILES)[:-1])]  # with each of the tiles
PROVED_COLUMNS = 256  # of each matrix


def make_device_model(
    config: Config,
    checkpoint: Checkpoint,
    source: ExpertSource,
    clock: StageClock,
    meter: ExpertMeter,
    device: torch.device,
) -> tuple[DeviceModel, PagePool]:
    """The model with its pages. Raises ConfigError where the memory does not do, or a product is wrong."""
    prove_products(sorted({size for _, size in dense_shapes(checkpoint.config)}), device)

    def make_pool() -> PagePool:
        memory = config.gateway.kv_cache_device_memory or int(KV_SHARE * _free_memory(device))
        log.info("keys and values get %s of the GPU's memory", format_size(memory))
        return PagePool(checkpoint.config, PAGE_DTYPE, memory, device)

    tilings = INVARIANT if config.gateway.batch_invariant else FAST
    try:
        experts: ExpertHalf = DispatchedExperts(source, clock)
        if config.gateway.local_experts:
            experts = load_experts(checkpoint, device)
        hops = None if config.gateway.local_experts else make_hops(config, checkpoint, device)
        model = DeviceModel(checkpoint, experts, make_pool, tilings, device, clock, hops, meter)
    except torch.OutOfMemoryError:
        raise ConfigError("gateway.device: the model does not fit the GPU's memory; choose --device cpu") from None
    if device.type == "cuda":
        model.warm_up()
    return model, model.pool


def make_hops(config: Config, checkpoint: Checkpoint, device: torch.device) -> DeviceHops:
    """The way to workers on this machine's GPUs."""
    gateway, dtypes = config.gateway, (torch.int8, ROW_DTYPES[config.reply_dtype])
    seconds = min(gateway.layer_timeout, ARENA_SECONDS)
    return DeviceHops(checkpoint.config, gateway.max_step_tokens, dtypes, device, seconds, gateway.audit)


def prove_products(sizes: list[int], device: torch.device) -> None:
    """Raise ConfigError unless rows of these sizes are multiplied exactly, whatever the tiles."""
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for rows in PROVED_ROWS:
            x, w = (
                torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
                for shape in ((rows, size), (PROVED_COLUMNS, size))
            )
            out = torch.empty(rows, PROVED_COLUMNS, device=device)
            linear(_with_ones(x, device), _with_ones(w, device), out)
            if not torch.equal(out.cpu(), (x.double() @ w.double().T).float()):
                raise ConfigError(f"gateway.device: {rows} rows of {size} are multiplied wrong; choose --device cpu")
    odd = torch.tensor([[0.0] * 16, [torch.inf, *[1.0] * 15], [*[0.5] * 15, -127.0]], device=device)
    scales = quantize_rows(odd).scales.tolist()
    if scales[0] != 0 or scales[1] == scales[1] or scales[2] != 1:
        raise ConfigError("gateway.device: the GPU quantizes rows wrong; choose --device cpu")


def _with_ones(values: torch.Tensor, device: torch.device) -> Quantized:
    return Quantized(values.to(device), torch.ones(len(values), device=device))


def _free_memory(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
