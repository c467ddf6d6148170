"""Real processes for the tests: expert workers and a gateway on loopback, on ports that the system chooses."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from consilium.checkpoint import Checkpoint
from consilium.shapes.folder import ShapeFolder

START_SECONDS = 90.0
STOP_SECONDS = 30.0


@dataclass
class Process:
    """One child process; its standard error goes to a file that failures quote."""

    argv: Sequence[str]
    popen: subprocess.Popen[str]
    log_file: Path
    address: str = ""  # as its listening line gives it
    metrics: str = ""  # the URL to scrape, where the line names one

    @property
    def pid(self) -> int:
        return self.popen.pid

    def log(self) -> str:
        """What it has written to standard error."""
        return self.log_file.read_text("utf-8", errors="replace")

    def wait_listening(self, seconds: float = START_SECONDS) -> None:
        """Return once it accepts calls; raises with its log when it ends or stays silent."""
        line = _read_line(self.popen.stdout, seconds)
        if not line:
            state = self.popen.poll()
            raise AssertionError(f"{' '.join(self.argv)} does not listen (exit status {state}):\n{self.log()}")
        announced = json.loads(line)
        self.address, self.metrics = announced["address"], announced.get("metrics", "")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Signal it and return its exit status (negative: the signal that ended it)."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal_number)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit status; raises with its log when it does not end."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise AssertionError(f"{' '.join(self.argv)} did not end in {seconds} s:\n{self.log()}") from None


@dataclass
class Stack:
    """A running gateway with its workers."""

    url: str
    gateway: Process
    workers: list[Process] = field(default_factory=list)


def launch(argv: Sequence[str], folder: Path | None = None, prefix: Sequence[str] = ()) -> Process:
    """Start ``python -m ARGV`` and do not wait for it; ``prefix`` is a command that runs it, and becomes it."""
    handle, name = tempfile.mkstemp(prefix=f"{argv[0]}-", suffix=".log", dir=folder)
    with os.fdopen(handle, "wb") as log:
        popen = subprocess.Popen(
            [*prefix, sys.executable, "-m", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(),
        )
    return Process(argv, popen, Path(name))


@contextmanager
def running(argv: Sequence[str], folder: Path | None = None, prefix: Sequence[str] = ()) -> Iterator[Process]:
    """``python -m ARGV`` from when it listens; stopped at the end, killed if need be."""
    with _stopped(launch(argv, folder, prefix)) as process:
        process.wait_listening()
        yield process


@contextmanager
def stack(
    model: Path | ShapeFolder,
    workers: int | Sequence[str] = 1,
    replicas: int = 1,
    quantization: str = "none",
    dtype: str = "float32",
    gateway_args: Sequence[str] = (),
    worker_args: Sequence[str] = (),
) -> Iterator[Stack]:
    """Workers that together hold every expert ``replicas`` times, or the selections given; and a ready gateway."""
    common = ["--model", str(model), "--quantization", quantization, "--dtype", dtype]
    selections = split_experts(model, workers, replicas) if isinstance(workers, int) else workers
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="stack-")))
        processes = [
            cleanup.enter_context(_stopped(launch(worker_argv(selection, *common, *worker_args), folder)))
            for selection in selections
        ]
        for process in processes:
            process.wait_listening()
        endpoints = [part for each in processes for part in ("--group-endpoint", f"experts={each.address}")]
        argv = ["gateway", *common, "--port", "0", "--threads", "1", "--device", "cpu", *endpoints, *gateway_args]
        gateway = cleanup.enter_context(running(argv, folder))
        wait_ready(gateway)
        yield Stack(gateway.address, gateway, processes)


def worker_argv(experts: str, *arguments: str) -> list[str]:
    """An expert worker on the CPU with one thread, on a free port, holding ``experts`` of every layer."""
    return ["expert_service", "--port", "0", "--threads", "1", "--device", "cpu", "--experts", experts, *arguments]


def split_experts(model: Path | ShapeFolder, workers: int, replicas: int) -> list[str]:
    """For each worker the experts it holds, so that every expert is on ``replicas`` of them, evenly."""
    held: list[list[str]] = [[] for _ in range(workers)]
    for expert in range(Checkpoint(model).config.num_experts):
        for replica in range(replicas):
            held[(expert * replicas + replica) % workers].append(str(expert))
    return [",".join(experts) for experts in held]


def wait_ready(gateway: Process, seconds: float = START_SECONDS) -> None:
    """Poll /ready until it answers 200; raises with its last answer and the log."""
    deadline = time.monotonic() + seconds
    answer = "no answer"
    while time.monotonic() < deadline and gateway.popen.poll() is None:
        try:
            response = httpx.get(f"{gateway.address}/ready", timeout=5.0)
        except httpx.TransportError as error:
            answer = repr(error)
        else:
            if response.status_code == 200:
                return
            answer = response.text
        time.sleep(0.05)
    raise AssertionError(f"the gateway is not ready: {answer}\n{gateway.log()}")


@contextmanager
def _stopped(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()
        if process.popen.stdout is not None:
            process.popen.stdout.close()


def _read_line(stream: IO[str] | None, seconds: float) -> str:
    """The first line, or nothing when none comes in time."""
    assert stream is not None
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(seconds) else ""


def _environment() -> dict[str, str]:
    """This process's environment without configuration of Consilium."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIUM_")}
    cache = os.environ.get("CONSILIUM_CACHE")
    return kept if cache is None else {**kept, "CONSILIUM_CACHE": cache}
