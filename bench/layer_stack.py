"""One routed layer as the engine has it, without the rest of a model: real workers, and the gateway's dispatcher.

Letters: T tokens, D hidden size, E experts, F expert FFN size, K experts per token.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Config, ExpertGroupConfig
from consilium.gate import Routing
from consilium.model_config import ModelConfig
from consilium.shapes.folder import ShapeFolder
from consilium.wire import ROW_DTYPES, WIRE_DTYPES
from gateway.arithmetic import Arithmetic, find_arithmetic
from gateway.dispatcher import Dispatcher
from gateway.expert_meter import ExpertMeter
from gateway.local_experts import local_experts
from gateway.mailbox import Mailbox
from gateway.moe_layer import MoELayer
from gateway.placement import Placement
from gateway.worker_connection import Expectations, WorkerConnection
from gateway.worker_pool import View, WorkerPool
from tests.random_checkpoint import save_random_mixtral
from tests.stack import Process, launch, split_experts, worker_argv

LAYER = 0
START_SECONDS = 240.0  # of a worker, which may have kernels to compile


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes of one layer."""

    hidden: int
    expert_size: int
    experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the engine's thread has of a gateway that serves one layer."""

    dispatcher: Dispatcher
    mailbox: Mailbox
    arithmetic: Arithmetic
    gate: MoELayer

    def wait_for(self, checkpoint: Checkpoint, seconds: float) -> None:
        """Return once every expert has a holder. Raises RuntimeError when that takes too long."""
        while missing := self.dispatcher.placement.missing(checkpoint.config):
            if not self.mailbox.receive(seconds):
                raise RuntimeError(f"{len(missing)} experts have no worker after {seconds:g} s; see the workers' logs")


@contextmanager
def random_layer(shape: LayerShape) -> Iterator[Path]:
    """A model folder with one layer of this shape; its experts hold the same numbers, each in memory of its own."""
    with tempfile.TemporaryDirectory(prefix="layer-") as folder:
        path = Path(folder) / "model"
        save_random_mixtral(path, shape.experts, 1, shape.hidden, shape.expert_size)
        yield path


@contextmanager
def expert_workers(
    model: Path | ShapeFolder, count: int, threads: int, device: str = "cpu", module: str = "expert_service"
) -> Iterator[list[Process]]:
    """``count`` int8 workers, programs ``module``, that share the experts out evenly; they start side by side."""
    common = ["--model", str(model), "--threads", str(threads), "--device", device]
    with ExitStack() as cleanup:
        flags = [worker_argv(held, *common)[1:] for held in split_experts(model, count, replicas=1)]
        workers = [launch([module, *each]) for each in flags]
        for each in workers:
            cleanup.callback(each.stop)
        for each in workers:
            each.wait_listening(START_SECONDS)
        yield workers


@contextmanager
def connected(
    model: Path | ShapeFolder,
    endpoints: Sequence[str],
    local_links: bool,
    quantization: str = "int8",
    follow: Callable[[Placement, Mapping[str, WorkerConnection]], None] = lambda _, __: None,
) -> Iterator[Gateway]:
    """A dispatcher over the workers at ``endpoints``, wired as the engine's process wires it.

    ``follow`` hears of workers and placements, too.
    """
    groups = {"experts": {"endpoint": list(endpoints)}}
    config = Config.model_validate({"model": str(model), "quantization": quantization, "experts": groups})
    checkpoint = Checkpoint(model)
    reply_dtype = ROW_DTYPES[config.reply_dtype]
    local = partial(local_experts, config, checkpoint)
    dispatcher = Dispatcher(reply_dtype, config.gateway, ExpertMeter(checkpoint.config), local)

    def handle(event: object) -> None:
        assert isinstance(event, View)
        dispatcher.follow(event.placement, event.workers)
        follow(event.placement, event.workers)

    arithmetic = find_arithmetic(config, checkpoint.config)
    gate = MoELayer(checkpoint, checkpoint.config.expert_layers()[0], dispatcher, arithmetic, dispatcher.clock)
    gateway = Gateway(dispatcher, Mailbox(handle), arithmetic, gate)
    expectations = Expectations(
        checkpoint.fingerprint,
        quantization,
        WIRE_DTYPES[reply_dtype],
        checkpoint.config.hidden_size,
        local_links=local_links,
    )
    pool = (config.experts, config.worker.max_frame, checkpoint.config, expectations, gateway.mailbox)
    with _pool_running(*pool):
        gateway.wait_for(checkpoint, 30.0)
        yield gateway


@contextmanager
def _pool_running(
    groups: dict[str, ExpertGroupConfig],
    max_frame: int,
    model: ModelConfig,
    expectations: Expectations,
    mailbox: Mailbox,
) -> Iterator[None]:
    """The I/O thread with the workers' connections; its end closes them."""
    loop = asyncio.new_event_loop()

    async def follow() -> None:
        await WorkerPool(groups, max_frame, model, expectations, mailbox).run()

    task = loop.create_task(follow())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), name="io", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


def random_routing(shape: LayerShape, tokens: int, random: np.random.Generator) -> Routing:
    """K distinct experts for each of T tokens, ascending, all equally likely."""
    ids = np.sort(np.argsort(random.random((tokens, shape.experts)), axis=1)[:, : shape.top_k], axis=1)  # [T, K]
    return Routing(torch.from_numpy(ids), torch.full((tokens, shape.top_k), 1 / shape.top_k))
