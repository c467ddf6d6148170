"""What distance costs: decode with the workers behind a delayed link, beside the same with them on the gateway's host.

`python -m bench.delayed --delay-command TOOL`, as root, with `ip` of iproute2. Gateway and workers get a network
namespace each; TOOL NS_A IP_A NS_B IP_B DELAY_MS LOSS joins them, prints a line when packets flow, runs until ended.
A step must wait for each layer's round trip; what it takes is held against twice the delay a layer and the near step:
with local links, and over gRPC through the same link without delay, which tells the distance from the transport.

The link is a program on the same cores. What it costs is shown too: bare sockets that carry a layer's bytes over it and
do nothing else, and the share of the cores that gateway, workers and link were busy.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import distribution
from bench.machine import ROOT, cpu_seconds, describe
from bench.namespaces import FAR, FAR_IP, NEAR, NEAR_IP, bare_seconds, inside, namespaces
from bench.report import RESULTS, write
from consilium.checkpoint import Checkpoint
from consilium.models import resolve_model
from gateway.stage_clock import LAYER_STAGES
from tests.stack import Process, running, split_experts, worker_argv

READY_SECONDS = 120.0
BARE_ROUNDS = 200
FETCH = "import sys, urllib.request as web; sys.stdout.write(web.urlopen(sys.argv[1]).read().decode())"


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway in NEAR and its workers."""

    gateway: Process
    workers: Sequence[Process]

    def cpu_seconds(self, link: int) -> dict[str, float]:
        """What each side has used so far."""
        workers = sum(cpu_seconds(worker.pid) for worker in self.workers)
        return {"gateway": cpu_seconds(self.gateway.pid), "workers": workers, "link": cpu_seconds(link)}

    def metrics(self) -> dict[str, float]:
        """The sums of the gateway's counters, by name and by stage."""
        asked = [*inside(NEAR), sys.executable, "-c", FETCH, f"{self.gateway.address}/metrics"]
        shown = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = dict[str, float]()
        for family in text_string_to_metric_families(shown):
            for sample in family.samples:
                name = sample.labels.get("stage", sample.name)
                found[name] = found.get(name, 0.0) + sample.value
        return found


@contextmanager
def gateway(options: argparse.Namespace, workers: str) -> Iterator[Running]:
    """A ready gateway in NEAR whose workers run in the namespace ``workers``."""
    model = ["--model", options.model, "--dtype", options.dtype]
    address = NEAR_IP if workers == NEAR else FAR_IP
    with ExitStack() as cleanup:
        processes = [
            cleanup.enter_context(running(worker_argv(held, *model, "--host", address), prefix=inside(workers)))
            for held in split_experts(resolve_model(options.model), options.workers, replicas=1)
        ]
        endpoints = [flag for each in processes for flag in ("--group-endpoint", f"experts={each.address}")]
        config = [] if options.config is None else ["--config", options.config]
        argv = ["gateway", *model, *config, "--port", "0", "--threads", "1", *endpoints]
        process = cleanup.enter_context(running(argv, prefix=inside(NEAR)))
        wait_ready(process)
        yield Running(process, processes)


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


def measure(stack: Running, link: int, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """The load's figures; beside them, means of a layer of a step, and how busy the processes were."""
    metrics, busy, start = stack.metrics(), stack.cpu_seconds(link), time.perf_counter()
    figures = load(stack.gateway.address, options)
    seconds = time.perf_counter() - start
    busy = {name: (now - busy[name]) / seconds for name, now in stack.cpu_seconds(link).items()}
    spent = {name: now - metrics.get(name, 0.0) for name, now in stack.metrics().items()}
    steps = layers * spent["consilium_iteration_seconds_count"]
    stages = {stage: spent[stage] / steps for stage in LAYER_STAGES}
    frames = spent["consilium_worker_frames_total"]
    sent, received = (spent[f"consilium_worker_{way}_bytes_total"] / frames for way in ("sent", "received"))
    return {
        **figures,
        "layer_seconds": stages,
        "busy_cores": busy,
        "frames": frames / steps / options.workers,  # of a layer, to one worker
        "frame_bytes": {"sent": sent, "received": received},
    }


def table(found: Mapping[str, dict[str, Any]], tokens: Mapping[str, float]) -> Table:
    """Milliseconds of a token and of a layer's stages, and the share of a core that each side took."""
    shown = Table("ms", *found, box=box.SIMPLE_HEAD)
    shown.add_row("token", *(f"{tokens[way] * 1e3:.1f}" for way in found))
    for stage in LAYER_STAGES:
        shown.add_row(f"layer: {stage}", *(f"{each['layer_seconds'][stage] * 1e3:.2f}" for each in found.values()))
    bare = (f"{each['bare_seconds']['p50'] * 1e3:.2f}" for each in found.values())
    shown.add_row("bare sockets, a layer's bytes", *bare)
    for part in ("gateway", "workers", "link"):
        shown.add_row(f"cores busy: {part}", *(f"{each['busy_cores'][part]:.2f}" for each in found.values()))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.delayed", description=__doc__)
    parser.add_argument("--delay-command", type=shlex.split, required=True, metavar="TOOL")
    parser.add_argument("--delay", type=float, default=1.0, metavar="MS", help="one way; 1")
    parser.add_argument("--mtu", type=int, default=1500, metavar="BYTES", help="9000 is usual within a data centre")
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--config", metavar="FILE", help="of the gateway")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--streams", type=int, default=16, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--name", default="delayed", help="of the file of figures")
    options = parser.parse_args(arguments)
    machine, found = describe(), dict[str, dict[str, Any]]()
    layers = len(Checkpoint(resolve_model(options.model)).config.expert_layers())
    delay = options.delay * 1e-3
    for way, workers, seconds in (("near", NEAR, 0.0), ("no delay", FAR, 0.0), ("far", FAR, delay)):
        with namespaces(options.delay_command, seconds * 1e3, options.mtu) as link:
            with gateway(options, workers) as stack:
                found[way] = measure(stack, link, layers, options)
            out, back = (round(found[way]["frame_bytes"][part]) for part in ("sent", "received"))
            found[way]["bare_seconds"] = distribution(bare_seconds(options.workers, out, back, BARE_ROUNDS))
    tokens = {way: figures["inter_token_latency"]["p50"] for way, figures in found.items()}
    ratios = {way: tokens["far"] / (tokens[way] + layers * 2 * delay) for way in ("near", "no delay")}
    Console().print(table(found, tokens))
    for way, ratio in ratios.items():
        print(f"far: {ratio:.2f} x of {way} + {layers} x {2 * options.delay:g} ms")
    parameters = {name: value for name, value in vars(options).items() if name not in ("delay_command", "name")}
    figures = {**found, "layers": layers, "ratios": ratios}
    print(f"written to {write(options.name, machine, parameters, figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
