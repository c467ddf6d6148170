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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from consilium.cli.first_request import Answer, Gateway, how_to_ask
from consilium.config import Config, load_config
from consilium.cores import usable_cores
from consilium.errors import ConfigError, DeadlineExceeded
from consilium.local_stack import LocalWorker, gateway_command, plan_workers, thread_environment, worker_command
from consilium.model_config import ModelConfig
from consilium.model_folder import read_model_folder
from consilium.models import FETCHABLE, is_model_folder, resolve_model
from consilium.supervisor import Child, Ended, Listening, StopAsked, next_event, stop

_COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")
# Beyond the time that a process is allowed for what it has accepted.
_GRACE_SECONDS = 5.0


class _Stopped(Exception):
    """Someone asked to stop before everything was ready."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """The gateway is ready."""


@dataclass(slots=True)
class _Stack:
    """The processes of one `up`, and where they report."""

    config: Config
    shared: list[str]  # arguments that workers and gateway have in common
    cores: int
    deadline: float  # monotonic; everything must be ready by then
    events: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    console: Console = field(default_factory=lambda: Console(stderr=True))
    workers: list[Child] = field(default_factory=list)
    gateway: Child | None = None
    closing: threading.Event = field(default_factory=threading.Event)
    not_ready: str = "the processes are starting"

    def start(self, name: str, command: Sequence[str], threads: int) -> Child:
        return Child(name, command, thread_environment(threads), self.events, self.show)

    def show(self, name: str, line: str) -> None:
        """Forward one line of a child's log."""
        number = 0 if name == "gateway" else 1 + int(name.rpartition("-")[2]) % (len(_COLOURS) - 1)
        self.console.print(Text.assemble((f"{name:<9}│ ", _COLOURS[number]), line), soft_wrap=True)

    def event_at_start(self) -> object:
        """The next event. Raises ChildDied, DeadlineExceeded, and _Stopped."""
        event = next_event(self.events, self.deadline)
        if isinstance(event, Ended):
            raise event.child.died(event.status, "before everything was ready")
        if isinstance(event, StopAsked):
            raise _Stopped
        if event is None:
            raise DeadlineExceeded(f"not ready in time (--start-timeout): {self.not_ready}")
        return event


def up(options: argparse.Namespace) -> int:
    """Run a local stack until it is stopped. Raises ConfigError, CheckpointError, ChildDied, DeadlineExceeded."""
    config = _load(options)
    model = _model(config)
    cores = options.threads or usable_cores()
    workers = plan_workers(config, model.num_experts, options.workers, options.replicas, cores)
    shared = ["--model", config.model, "--quantization", config.quantization, "--dtype", config.dtype]
    if options.config:
        shared += ["--config", options.config]
    stack = _Stack(config, shared, cores, time.monotonic() + options.start_timeout)
    with _signals(stack.events):
        try:
            gateway = _start(stack, workers)
            _introduce(stack, gateway, model, workers)
            return _watch(stack, gateway, options.demo)
        except _Stopped:
            return 0
        finally:
            _stop(stack)


def _load(options: argparse.Namespace) -> Config:
    overrides = {
        "model": options.model,
        "quantization": options.quantization,
        "dtype": options.dtype,
        "gateway.host": options.host,
        "gateway.port": options.port,
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


def _start(stack: _Stack, workers: Sequence[LocalWorker]) -> Gateway:
    """Start the workers, then the gateway with their addresses, and wait until it is ready."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stack.console, transient=True) as progress:
        task = progress.add_task("starting the expert workers", total=len(workers) + 2)
        groups = _start_workers(stack, workers, progress, task)
        progress.update(task, description="starting the gateway")
        threads = stack.config.gateway.threads or stack.cores
        command = gateway_command(stack.config, groups, threads, stack.shared)
        stack.gateway = stack.start("gateway", command, threads)
        event = stack.event_at_start()
        while not isinstance(event, Listening):
            event = stack.event_at_start()
        keys = stack.config.gateway.api_keys
        gateway = Gateway(_reachable(event.address), keys[0].get_secret_value() if keys else None)
        progress.advance(task)

        def tell(reason: str) -> None:
            stack.not_ready = reason
            progress.update(task, description=f"waiting for the gateway: {reason}")

        def probe() -> None:
            if gateway.wait_until_ready(stack.closing, tell):
                stack.events.put(_Ready())

        threading.Thread(target=probe, name="ready-probe", daemon=True).start()
        while not isinstance(stack.event_at_start(), _Ready):
            pass
    return gateway


def _start_workers(
    stack: _Stack, workers: Sequence[LocalWorker], progress: Progress, task: TaskID
) -> list[tuple[str, str]]:
    """Pairs of a group's name and a worker's address, in the order of ``workers``."""
    for worker in workers:
        stack.workers.append(stack.start(worker.name, worker_command(worker, stack.shared), worker.threads))
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


def _introduce(stack: _Stack, gateway: Gateway, model: ModelConfig, workers: Sequence[LocalWorker]) -> None:
    """Print what is running and how to send a first request."""
    name = gateway.model_name()
    layers = len(model.expert_layers())
    print(f"\n{name} is ready at {gateway.url}/v1")
    print(f"{model.num_experts} experts in each of {layers} layers, {stack.config.quantization}, on", end=" ")
    print(f"{len(workers)} workers: " + "; ".join(f"{w.name} ({w.group}) holds {_ranges(w.experts)}" for w in workers))
    print(f"\n{how_to_ask(gateway.url, name, gateway.api_key is not None)}\n", flush=True)
    if stack.config.experts:
        stack.console.print("the endpoints under `experts:` were replaced by those of the local workers")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _watch(stack: _Stack, gateway: Gateway, demo: bool) -> int:
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


def _stop(stack: _Stack) -> None:
    """The gateway first, so that what it has accepted finds its workers; then the workers."""
    stack.closing.set()
    if any(child.running for child in [*stack.workers, *([stack.gateway] if stack.gateway else [])]):
        stack.console.print("stopping (Ctrl-C again does not wait for running requests)")
    hurried = False
    if stack.gateway is not None:
        hurried = stop([stack.gateway], stack.events, stack.config.gateway.drain_timeout + _GRACE_SECONDS)
    stop(stack.workers, stack.events, 0.0 if hurried else stack.config.worker.drain_timeout + _GRACE_SECONDS)


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
