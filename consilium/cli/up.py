"""`consilium up`: expert workers and a gateway on this machine, from start to stop.

The main thread reads one queue of events: children that listen or end, the gateway becoming ready, Ctrl-C.
"""

from __future__ import annotations

import argparse
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from consilium import mps
from consilium.cli.first_request import Answer, Gateway, how_to_ask
from consilium.cli.local_processes import LocalProcesses, StoppedAtStart
from consilium.config import Config, load_config
from consilium.cores import usable_cores
from consilium.embedded_cache import EmbeddedCache
from consilium.errors import ConfigError
from consilium.local_stack import LocalWorker, gateway_command, plan_workers, ranges, router_command, worker_command
from consilium.model_config import ModelConfig
from consilium.model_folder import read_model_folder
from consilium.models import FETCHABLE, is_model_folder, resolve_model
from consilium.supervisor import Ended, Listening, StopAsked, next_event


@dataclass(frozen=True, slots=True)
class _Ready:
    """The gateway is ready."""


def up(options: argparse.Namespace) -> int:
    """Run a local stack until it is stopped. Raises ConfigError, CheckpointError, ChildDied, DeadlineExceeded."""
    cache = EmbeddedCache(options.cache) if options.cache else None
    try:
        return _up(options, cache)
    finally:
        if cache is not None:
            cache.remove()


def _up(options: argparse.Namespace, cache: EmbeddedCache | None) -> int:
    config = _load(options, cache)
    model = _model(config)
    cores = options.threads or usable_cores()
    workers = plan_workers(config, model.num_experts, options.workers, options.replicas, cores)
    shared = ["--model", config.model, "--quantization", config.quantization, "--dtype", config.dtype]
    if options.config:
        shared += ["--config", options.config]
    with ExitStack() as around:
        stack = LocalProcesses(config, shared, cores, time.monotonic() + options.start_timeout)
        around.enter_context(_signals(stack.events))
        stack.environ = around.enter_context(mps.shared(config.worker.device, stack.console.print))
        try:
            if cache is not None:
                stack.start_cache(cache.command())
            router = None
            if options.router:
                router = stack.start_router(router_command(shared, options.replicas, options.start_timeout))
            gateway = _start(stack, workers, router)
            _introduce(stack, gateway, model, workers)
            if router is not None:
                stack.console.print(f"watch the workers with: consilium status --router {router}", highlight=False)
            return _watch(stack, gateway, options.demo)
        except StoppedAtStart:
            return 0
        finally:
            stack.stop()


def _load(options: argparse.Namespace, cache: EmbeddedCache | None) -> Config:
    overrides = {
        "model": options.model,
        "quantization": options.quantization,
        "dtype": options.dtype,
        "gateway.host": options.host,
        "gateway.port": options.port,
        "worker.metrics_port": 0 if options.metrics else None,
        "cache.redis": options.redis if cache is None else cache.url,
    }
    return load_config(Path(options.config) if options.config else None, overrides=overrides)


def _model(config: Config) -> ModelConfig:
    """The model's shape; the default model is fetched when it is asked for and not there."""
    if config.model in FETCHABLE and not is_model_folder(Path(config.model)):
        from consilium.default_model import fetch_default

        fetch_default()
    model = read_model_folder(resolve_model(config.model)).config
    if not model.expert_layers():
        raise ConfigError(f"{config.model} has no layer with experts; there is nothing for expert workers to do")
    return model


def _start(stack: LocalProcesses, workers: Sequence[LocalWorker], router: str | None) -> Gateway:
    """Start the workers, then the gateway with their addresses, and wait until it is ready."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stack.console, transient=True) as progress:
        task = progress.add_task("starting the expert workers", total=len(workers) + 2)
        groups = _start_workers(stack, workers, router, progress, task)
        progress.update(task, description="starting the gateway")
        threads = stack.config.gateway.threads or stack.cores
        command = gateway_command(stack.config, groups, threads, stack.shared, router)
        stack.start_gateway(command, threads)
        event = stack.event_at_start()
        while not isinstance(event, Listening):
            event = stack.event_at_start()
        progress.advance(task)
        keys = stack.config.gateway.api_keys
        gateway = Gateway(_reachable(event.address), keys[0].get_secret_value() if keys else None)
        _await_ready(stack, gateway, progress, task)
    return gateway


def _await_ready(stack: LocalProcesses, gateway: Gateway, progress: Progress, task: TaskID) -> None:
    """Ask from another thread, so that this one still hears of Ctrl-C and of children that end."""

    def tell(reason: str) -> None:
        stack.not_ready = reason
        progress.update(task, description=f"waiting for the gateway: {escape(reason)}")

    def probe() -> None:
        if gateway.wait_until_ready(stack.closing, tell):
            stack.events.put(_Ready())

    threading.Thread(target=probe, name="ready-probe", daemon=True).start()
    while not isinstance(stack.event_at_start(), _Ready):
        pass


def _start_workers(
    stack: LocalProcesses, workers: Sequence[LocalWorker], router: str | None, progress: Progress, task: TaskID
) -> list[tuple[str, str]]:
    """Pairs of a group's name and a worker's address, in the order of ``workers``."""
    metrics = stack.config.worker.metrics_port is not None  # one port cannot be all workers'
    for worker in workers:
        command = worker_command(worker, stack.shared, metrics=metrics, router=router)
        stack.start_worker(worker.name, command, worker.threads)
    addresses: dict[str, str] = {}
    while len(addresses) < len(workers):
        event = stack.event_at_start()
        if isinstance(event, Listening):
            addresses[event.child.name] = event.address
            progress.advance(task)
    return [(worker.group, addresses[worker.name]) for worker in workers]


def _reachable(address: str) -> str:
    """An address for clients on this machine: one that stands for all interfaces cannot be called."""
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _introduce(stack: LocalProcesses, gateway: Gateway, model: ModelConfig, workers: Sequence[LocalWorker]) -> None:
    """Print what is running and how to send a first request."""
    name = gateway.model_name()
    layers = len(model.expert_layers())
    held = "; ".join(f"{worker.name} ({worker.group}) holds {ranges(worker.experts)}" for worker in workers)
    shape = f"{model.num_experts} experts in each of {layers} layers, {stack.config.quantization}"
    example = how_to_ask(gateway.url, name, gateway.api_key is not None)
    # One call, so that no line of a log comes between.
    print(
        f"\n{name} is ready at {gateway.url}/v1\n{shape}, on {len(workers)} workers: {held}\n\n{example}\n", flush=True
    )
    if stack.config.experts:
        stack.console.print("the endpoints under `experts:` were replaced by those of the local workers")


def _watch(stack: LocalProcesses, gateway: Gateway, demo: bool) -> int:
    """Exit status, once the stack is told to stop (0) or the gateway has ended by itself (1)."""
    if demo:

        def ask() -> None:
            stack.events.put(gateway.ask(gateway.model_name()))

        threading.Thread(target=ask, name="first-request", daemon=True).start()
    while True:
        event = next_event(stack.events, None)
        if isinstance(event, Answer):
            print(f"> {event.prompt}\n{event.text.strip()}\n\nCtrl-C stops everything.", flush=True)
        elif isinstance(event, str):
            stack.console.print(Text(f"the first request failed: {event}", style="bold red"), soft_wrap=True)
        elif isinstance(event, StopAsked):
            return 0
        elif isinstance(event, Ended) and event.child is stack.gateway:
            raise event.child.died(event.status, "while it was serving")
        elif isinstance(event, Ended):
            lost = event.child.died(event.status, "while it was serving").message
            stack.console.print(Text(f"{lost}\nThe rest goes on without it.", style="bold red"), soft_wrap=True)


@contextmanager
def _signals(events: queue.SimpleQueue[object]) -> Iterator[None]:
    """SIGINT and SIGTERM become events while this is open."""

    def ask(_: int, __: FrameType | None) -> None:
        events.put(StopAsked())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
