"""What distance costs: decode with the workers behind a delayed link, beside the same with them on the gateway's host.

`python -m bench.delayed --delay-command TOOL`, as root, with `ip` of iproute2. Gateway and workers get a network
namespace each; TOOL NS_A IP_A NS_B IP_B DELAY_MS LOSS joins them, prints a line when packets flow, runs until ended.
A step must wait for each layer's round trip; what it takes is held against the near step and twice the delay a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import ROOT, describe
from bench.report import RESULTS, write
from consilium.checkpoint import Checkpoint
from consilium.models import resolve_model
from tests.stack import Process, running, split_experts, worker_argv

NEAR, FAR = (f"consilium-{os.getpid()}-{side}" for side in ("near", "far"))
NEAR_IP, FAR_IP = "10.213.78.1", "10.213.78.2"
READY_SECONDS = 120.0

Command = tuple[str, ...]


def inside(namespace: str) -> Command:
    """The command that runs another one in a namespace."""
    return ("ip", "netns", "exec", namespace)


@contextmanager
def namespaces(delay_command: Sequence[str], delay_ms: float) -> Iterator[None]:
    """NEAR and FAR, joined by a link with ``delay_ms`` each way. Raises RuntimeError when the tool fails."""
    with ExitStack() as cleanup:
        for name in (NEAR, FAR):
            subprocess.run(["ip", "netns", "add", name], check=True)
            cleanup.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        command = [*delay_command, NEAR, NEAR_IP, FAR, FAR_IP, str(delay_ms), "0"]
        link = cleanup.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        cleanup.callback(link.terminate)
        assert link.stdout is not None
        if not link.stdout.readline():
            raise RuntimeError(f"{shlex.join(command)} ended before its link was up")
        yield


@contextmanager
def gateway(options: argparse.Namespace, workers: str) -> Iterator[str]:
    """The URL, in NEAR, of a ready gateway whose workers run in the namespace ``workers``."""
    model = ["--model", options.model, "--dtype", options.dtype]
    address = NEAR_IP if workers == NEAR else FAR_IP
    with ExitStack() as cleanup:
        endpoints = list[str]()
        for held in split_experts(resolve_model(options.model), options.workers, replicas=1):
            argv = worker_argv(held, *model, "--host", address)
            process = cleanup.enter_context(running(argv, prefix=inside(workers)))
            endpoints += ["--group-endpoint", f"experts={process.address}"]
        argv = ["gateway", *model, "--port", "0", "--threads", "1", *endpoints]
        process = cleanup.enter_context(running(argv, prefix=inside(NEAR)))
        wait_ready(process)
        yield process.address


def wait_ready(process: Process) -> None:
    """Raises RuntimeError with its log when it does not get ready."""
    asked = [*inside(NEAR), sys.executable, "-m", "consilium.health", f"{process.address}/ready"]
    deadline = time.monotonic() + READY_SECONDS
    while subprocess.run(asked, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the gateway is not ready:\n{process.log()}")
        time.sleep(0.5)


def load(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the load benchmark, run in NEAR."""
    name = f"delayed-{os.getpid()}"
    streams = ["--concurrency", str(options.streams), "--requests", str(options.streams), "--warmup", "2"]
    tokens = ["--prompt-tokens", "16", "--output-tokens", str(options.output_tokens)]
    command = [*inside(NEAR), sys.executable, "-m", "bench", "--url", url, *streams, *tokens, "--name", name]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = RESULTS / f"{name}.json"
    (figures,) = json.loads(file.read_text("utf-8"))["figures"]
    file.unlink()
    return dict(figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.delayed", description=__doc__)
    parser.add_argument("--delay-command", type=shlex.split, required=True, metavar="TOOL")
    parser.add_argument("--delay", type=float, default=1.0, metavar="MS", help="one way; 1")
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--streams", type=int, default=16, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    options = parser.parse_args(arguments)
    machine, found = describe(), dict[str, dict[str, Any]]()
    with namespaces(options.delay_command, options.delay):
        for way, workers in (("near", NEAR), ("far", FAR)):
            with gateway(options, workers) as url:
                found[way] = load(url, options)
    near, far = (found[way]["inter_token_latency"]["p50"] for way in ("near", "far"))
    layers = len(Checkpoint(resolve_model(options.model)).config.expert_layers())
    allowed = near + layers * 2 * options.delay / 1e3
    ratio = far / allowed
    table = Table("near", "far", f"near + {layers} × {2 * options.delay:g} ms", "far against that", box=box.SIMPLE_HEAD)
    table.add_row(*(f"{each * 1e3:.1f} ms" for each in (near, far, allowed)), f"{ratio:.2f} ×")
    Console().print(table)
    parameters = {name: value for name, value in vars(options).items() if name != "delay_command"}
    figures = {**found, "layers": layers, "allowed_seconds": allowed, "ratio": ratio}
    print(f"written to {write('delayed', machine, parameters, figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
