"""One worker from start to end: load, prove, listen, answer, drain, leave."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from consilium.checkpoint import Checkpoint
from consilium.config import Config, ExpertGroupConfig
from consilium.errors import ConfigError, ConsiliumError
from consilium.experts import Arithmetic
from consilium.frames import PROTOCOL_VERSION
from consilium.link_packets import RowFormat
from consilium.model_config import ModelConfig
from consilium.model_folder import ModelFolder
from consilium.models import resolve_model
from consilium.rpc import ErrorInterceptor, server_options
from consilium.server import advertised, catch_signals, listen
from consilium.shared_memory import SharedMemory
from consilium.telemetry import announce
from consilium.tokens import WORKER, metadata_of
from consilium.wire import WIRE_DTYPES
from expert_service.device import WorkerDevice, find_device
from expert_service.executor import Executor
from expert_service.expert_memory import AllInMemory, ExpertMemory
from expert_service.frame_computer import FrameComputer
from expert_service.holdings import Holdings, describe_store
from expert_service.joining import complete
from expert_service.layer_kernels import LayerKernels
from expert_service.limits import check_limit, limited_memory
from expert_service.local_link import LocalLink
from expert_service.local_listener import LocalListener
from expert_service.metrics import ServiceMetrics
from expert_service.registration import Registration
from expert_service.selection import select_experts, select_layers
from expert_service.servicer import SERVICE, BareForward, ExpertServicer
from expert_service.sources import (
    DiskWeights,
    HeldSource,
    LocalWeights,
    PeerWeights,
    PlacedWeights,
    WeightSource,
    blank_weights,
)
from expert_service.speed import measure
from expert_service.store import ExpertStore, load_store
from expert_service.tokens import Tokens
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.router.v1 import router_pb2

if TYPE_CHECKING:
    from expert_service.device_steps import DeviceSteps

logger = logging.getLogger(__name__)

# Unfinished calls and unread answers may take so many largest frames of memory before new calls are refused.
QUEUED_FRAMES, UNREAD_FRAMES = 4, 2
# Of a GPU's memory: for the rows of calls, for kernels, and for what the allocator cannot use.
KEPT_FREE = 0.05
# For the last bytes to leave once everything is answered.
CLOSING_SECONDS = 1.0
LEAST_DRAIN_SECONDS = 0.1  # for calls, when the router took all the time


class Worker:
    """The experts of one process with all that is needed to serve them; ready when constructed."""

    def __init__(self, config: Config) -> None:
        """Load the weights and prove the kernels. Raises ConsiliumError that says what is wrong."""
        config, joined = complete(config)
        self.config = config
        self.tokens = Tokens(config)
        self.max_batch = _max_batch(config)
        if config.worker.threads is not None:
            torch.set_num_threads(config.worker.threads)
        checkpoint = None if joined else Checkpoint(resolve_model(config.model))
        self.name = config.model if checkpoint is None else checkpoint.folder.name
        self.fingerprint, self.model, group = _identity(checkpoint or joined)
        layers = select_layers(config.worker.layers, self.model)
        experts = select_experts(config.worker.experts, self.model)
        self.router = config.router if config.router is not None and config.router.endpoint is not None else None
        if self.router is not None and config.worker.experts.strip() == "all":
            experts = []  # the router decides
        self.device: WorkerDevice = find_device(config, self.model)
        self.arithmetic: Arithmetic = self.device.arithmetic
        self.layout = blank_weights(self.arithmetic, self.model, group)
        self.source: HeldSource = self._source(checkpoint)
        self.store: ExpertStore = load_store(self.source, layers, experts)
        self.memory = self._memory(checkpoint)

    def _source(self, checkpoint: Checkpoint | None) -> HeldSource:
        if self.config.worker.memory_limit is not None:
            checkpoint = check_limit(self.device, checkpoint)
            return DiskWeights(checkpoint, self.arithmetic, self.layout)
        return PlacedWeights(self._weights(checkpoint), self.device.place)

    def _weights(self, checkpoint: Checkpoint | None) -> WeightSource:
        if checkpoint is not None:
            return LocalWeights(checkpoint, self.arithmetic)
        assert self.router is not None
        assert self.router.endpoint is not None
        shown, version = metadata_of(self.config.tokens, WORKER), self.config.weight_version
        return PeerWeights(self.router.endpoint, shown, self.layout, version)

    def _memory(self, checkpoint: Checkpoint | None) -> ExpertMemory:
        """For experts on disk, where there is a limit."""
        if self.config.worker.memory_limit is None or checkpoint is None:
            return AllInMemory()
        to_come = 0 if self.router is None else self.capacity - self.held
        if not self.held:  # what a router gives later would be refused one by one
            self.source.load(self.model.expert_layers()[0], 0)
        checkpoint.release()
        self.store.memory = limited_memory(self.config, self.model, self.arithmetic, self.layout, to_come)
        return self.store.memory

    @property
    def held(self) -> int:
        """How many experts of all layers."""
        return sum(map(len, self.store.hashes.values()))

    @property
    def capacity(self) -> int:
        """How many a router may have it hold, those that it has included; with a memory limit on disk, too."""
        whole = len(self.model.expert_layers()) * self.model.num_experts
        memory, device = self.config.worker.memory, self.device.memory()
        if memory is None and device is not None:
            memory = self.store.nbytes + max(0, device.free - int(device.total * KEPT_FREE))
        return whole if memory is None else min(whole, max(self.held, memory // self.layout.nbytes()))

    def describe(self) -> expert_pb2.DescribeResponse:
        """What this worker says about itself."""
        return expert_pb2.DescribeResponse(
            protocol_version=PROTOCOL_VERSION,
            worker_id=uuid.uuid4().hex,
            group=self.config.worker.group,
            model=self.name,
            model_fingerprint=self.fingerprint,
            quantization=self.config.quantization,
            row_dtype=WIRE_DTYPES[self.arithmetic.reply_dtype],
            numerics_class=self.arithmetic.numerics_class,
            hidden_size=self.model.hidden_size,
            max_batch=self.max_batch,
            layers=describe_store(self.store),
            device=self.device.name,
            weight_version=self.config.weight_version,
        )

    def layer_kernels(self) -> LayerKernels | None:
        """What computes whole steps on a device, where this worker can."""
        return self.device.layer_kernels(self.store, self.model)

    async def serve(self) -> None:
        """Answer calls until SIGTERM or SIGINT, then drain. Raises ConfigError when a port cannot be had."""
        config = self.config.worker
        sizes = self.model.hidden_size, self.max_batch, config.max_frame
        computer = FrameComputer(self.store, self.arithmetic, *sizes, self.memory)
        description = self.describe()
        executor = Executor(computer, config.max_queue, QUEUED_FRAMES * config.max_frame)
        metrics = ServiceMetrics(description, executor, self.store, self.memory, self.device)
        servicer = ExpertServicer(description, executor, metrics, UNREAD_FRAMES * config.max_frame, self.store)
        interceptors = [*self.tokens.interceptors(), ErrorInterceptor(), BareForward()]
        server = grpc.aio.server(interceptors=interceptors, options=server_options(config.max_frame))
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, server)
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        if not self.tokens.asked:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = listen(server, config.host, config.port)
        scraped = None if config.metrics_port is None else metrics.serve(config.host, config.metrics_port)
        listener = None  # after all that may fail: nobody but it removes its file
        if config.local_links:
            kernels, start_steps = self.layer_kernels(), None
            if kernels is not None:
                from consilium.gpu.device_memory import device_uuid  # these need Triton
                from expert_service.device_steps import DeviceSteps

                description.device_uuid = device_uuid(kernels.device)
                start_steps = partial(DeviceSteps, kernels, servicer.admit, metrics.count_steps())
            adopt = _adopter(executor, computer.form, servicer, start_steps)
            listener = LocalListener(description.worker_id, config.socket_folder, adopt)
            description.local_sockets.extend(listener.names)
        stopping = catch_signals()
        await server.start()
        try:
            async with self._registered(description, address, stopping) as registration:
                await status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
                announce(address, scraped)
                await stopping.wait()
                deadline = asyncio.get_running_loop().time() + config.drain_timeout
                if registration is not None:
                    await registration.drain(config.drain_timeout)
        except ConsiliumError:  # the router refuses it
            if listener is not None:
                listener.close()
            await server.stop(None)
            raise
        await status.enter_graceful_shutdown()
        if listener is not None:
            listener.close()
        await _drain(servicer, deadline - asyncio.get_running_loop().time())
        await server.stop(CLOSING_SECONDS)
        if not executor.close(CLOSING_SECONDS):
            logger.warning("leaving in the middle of a call")
            logging.shutdown()
            os._exit(0)  # an ordinary exit would tear the interpreter down under the computing thread

    @asynccontextmanager
    async def _registered(
        self, description: expert_pb2.DescribeResponse, address: str, stopping: asyncio.Event
    ) -> AsyncIterator[Registration | None]:
        """With the router, where there is one."""
        if self.router is None:
            yield None
            return
        config = self.config.worker
        row_ns, read_ns = measure(*self.device.samples(self.layout), self.model.hidden_size, config.speed)
        worker = router_pb2.Worker(
            description=description,
            address=config.advertise or advertised(address, self.router.endpoint or ""),
            host=config.node,
            capacity=self.capacity,
            row_ns=row_ns,
            read_ns=read_ns,
        )
        del worker.description.layers[:]
        holdings = Holdings(self.source, self.store, description)
        metadata = metadata_of(self.config.tokens, WORKER)
        registration = Registration(self.router.endpoint or "", metadata, worker, holdings, self.tokens)
        async with registration.running(stopping):
            yield registration


def _identity(model: Checkpoint | ModelFolder | None) -> tuple[str, ModelConfig, int]:
    """Fingerprint, shape, and int4's groups."""
    assert model is not None
    return model.fingerprint, model.config, model.int4_group


def _adopter(
    executor: Executor,
    form: RowFormat,
    servicer: ExpertServicer,
    start_steps: Callable[[], DeviceSteps] | None,
) -> Callable[[socket.socket, SharedMemory], None]:
    def adopt(link: socket.socket, memory: SharedMemory) -> None:
        steps = None if start_steps is None else start_steps()
        executor.add_link(LocalLink(link, memory, form, servicer.take, steps))

    return adopt


async def _drain(servicer: ExpertServicer, seconds: float) -> None:
    logger.info("draining: finishing the calls taken, for at most %.3g s", seconds)
    try:
        await asyncio.wait_for(servicer.drain(), max(seconds, LEAST_DRAIN_SECONDS))
    except TimeoutError:
        logger.warning("draining took more than worker.drain_timeout; the rest is given up")


def _max_batch(config: Config) -> int:
    """From this worker's entry under `experts:`, or the default where there are no entries at all."""
    name = config.worker.group
    if not config.experts:
        return int(ExpertGroupConfig.model_fields["max_batch"].default)
    if name not in config.experts:
        raise ConfigError(
            f"worker.group: {name!r} is not under experts: in the configuration; choose one of "
            f"{', '.join(sorted(config.experts))} (--group)"
        )
    return config.experts[name].max_batch
