"""One routed layer over real workers: what a layer takes, how much of that is the experts' own, how workers scale.

`python -m bench.expert_layer` (or `consilium bench layer`) has the time of single layers, with `--trace` by stage;
`--throughput` the rows per second of 1, 2, 4 and 8 workers that share the experts, with two layers in flight so that
no worker waits for the gateway. A layer is: gate, quantize the rows, group, dispatch (encode, wire, compute, decode),
combine; its gate chooses among the experts of random rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.figures import distribution
from bench.layer_stack import (
    LAYER,
    Gateway,
    LayerShape,
    connected,
    expert_workers,
    random_layer,
    random_routing,
)
from bench.machine import cpu_seconds, describe
from bench.report import write
from consilium.gate import Routing
from gateway.batches import combine, group_by_expert
from gateway.stage_clock import LAYER_STAGES
from tests.stack import Process

TRACED = LAYER_STAGES[1:]  # without attention
INPUTS = 16  # different batches of random rows, used in turn

Input = tuple[Tensor, Routing]


async def layer(gateway: Gateway, x: Tensor, routing: Routing) -> Tensor:
    """[T, D] -> [T, D]. Raises the first error of a row."""
    clock = gateway.dispatcher.clock
    gateway.gate.gate.route(x)  # what it takes; the routing is the input's, as even as in a trained model
    clock.mark("gate")
    rows, scales = gateway.arithmetic.expert_rows(x)
    batches = group_by_expert(rows, scales, routing)
    clock.mark("group")
    outputs, failures = await gateway.dispatcher.dispatch(LAYER, batches)
    for error in failures.values():
        raise error
    combined = combine(outputs, routing)
    outputs.release()
    clock.mark("combine")
    return combined


def single_layers(gateway: Gateway, inputs: Sequence[Input], calls: int) -> dict[str, Any]:
    """Layers one after the other: seconds of each, of its slowest worker, and of every stage."""
    whole, compute, sent, received = list[float](), list[float](), 0, 0
    stages: dict[str, list[float]] = {stage: [] for stage in TRACED}
    for call in range(calls):
        start = time.perf_counter()
        gateway.dispatcher.clock.start()
        gateway.mailbox.drive(layer(gateway, *inputs[call % len(inputs)]))
        whole.append(time.perf_counter() - start)
        stats = gateway.dispatcher.take_stats()
        compute.append(max(each.compute_seconds for each in stats))
        sent += sum(each.bytes_sent for each in stats)
        received += sum(each.bytes_received for each in stats)
        spent = gateway.dispatcher.clock.take()
        for stage, seconds in stages.items():
            seconds.append(spent[stage])
    return {
        "layer": distribution(whole),
        "experts": distribution(compute),
        "beyond": distribution([all_ - own for all_, own in zip(whole, compute, strict=True)]),
        "bytes_out": sent // calls,
        "bytes_back": received // calls,
        "stages": {stage: distribution(seconds) for stage, seconds in stages.items()},
    }


def many_layers(gateway: Gateway, inputs: Sequence[Input], calls: int, in_flight: int) -> dict[str, Any]:
    """Expert rows per second with ``in_flight`` layers at once."""

    async def lane(first: int) -> None:
        for call in range(first, calls, in_flight):
            await layer(gateway, *inputs[call % len(inputs)])

    start = time.perf_counter()
    gateway.mailbox.drive_all([lane(first) for first in range(in_flight)])
    seconds = time.perf_counter() - start
    stats = gateway.dispatcher.take_stats()
    return {
        "rows_per_second": sum(each.rows for each in stats) / seconds,
        "compute_share": sum(each.compute_seconds for each in stats) / len(stats) / seconds,
    }


def measure(model: Path, shape: LayerShape, workers: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one number of workers."""
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    inputs = [
        (torch.randn(options.tokens, shape.hidden, generator=generator), random_routing(shape, options.tokens, random))
        for _ in range(INPUTS)
    ]
    with (
        expert_workers(model, workers, options.threads) as processes,
        connected(model, [each.address for each in processes], not options.grpc) as gateway,
    ):
        single_layers(gateway, inputs, options.warmup)
        start, busy = time.perf_counter(), _cpu_seconds(processes)
        if options.throughput:
            figures = many_layers(gateway, inputs, options.calls, options.in_flight)
        else:
            figures = single_layers(gateway, inputs, options.calls)
        seconds = time.perf_counter() - start
        return {"workers": workers, **figures, "host_cpu": (_cpu_seconds(processes) - busy) / seconds}


def _cpu_seconds(processes: Sequence[Process]) -> float:
    """What this process and the workers have used so far."""
    return time.process_time() + sum(cpu_seconds(process.pid) for process in processes)


def _times(each: dict[str, float]) -> str:
    return "/".join(f"{each[name] * 1e3:.2f}" for name in ("p50", "p95", "p99"))


def layer_table(figures: Sequence[dict[str, Any]]) -> Table:
    """Times are ms, p50/p95/p99."""
    table = Table(box=box.SIMPLE_HEAD, caption="ms: p50/p95/p99; experts: the slowest worker of each layer")
    for heading in ("workers", "layer", "experts", "beyond", "KiB out", "KiB back", "host CPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        sizes = [f"{each[name] / 1024:.0f}" for name in ("bytes_out", "bytes_back")]
        times = [_times(each[name]) for name in ("layer", "experts", "beyond")]
        table.add_row(str(each["workers"]), *times, *sizes, f"{each['host_cpu']:.0%}")
    return table


def trace_table(figures: Sequence[dict[str, Any]]) -> Table:
    """Where a layer's time goes, in the order in which it goes there; times are µs, p50/p95."""
    table = Table(
        box=box.SIMPLE_HEAD, caption="µs: p50/p95; queue and compute: the slowest worker's, as far as waited for"
    )
    table.add_column("stage")
    for each in figures:
        table.add_column(f"{each['workers']} workers", justify="right", no_wrap=True)
    for stage in TRACED:
        times = [each["stages"][stage] for each in figures]
        table.add_row(stage, *(f"{time_['p50'] * 1e6:.0f}/{time_['p95'] * 1e6:.0f}" for time_ in times))
    return table


def throughput_table(figures: Sequence[dict[str, Any]]) -> Table:
    """Linear is so many times the first line's rows per worker."""
    table = Table(box=box.SIMPLE_HEAD, caption="busy: mean share of the time in which a worker computed")
    for heading in ("workers", "rows/s", "of linear", "busy", "host CPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        shares = (f"{each['of_linear']:.3f}", f"{each['compute_share']:.0%}", f"{each['host_cpu']:.0%}")
        table.add_row(str(each["workers"]), f"{each['rows_per_second']:.0f}", *shares)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = _parse(arguments)
    machine, console = describe(), Console(stderr=True)
    shape = LayerShape(options.hidden, options.expert_size, options.experts, options.top_k)
    figures = list[dict[str, Any]]()
    with random_layer(shape) as model, torch.inference_mode():
        for workers in options.workers:
            console.print(f"{workers} workers: {options.calls} layers of {options.tokens} tokens")
            figures.append(measure(model, shape, workers, options))
    if options.throughput:
        one = figures[0]["rows_per_second"] / figures[0]["workers"]
        figures = [{**each, "of_linear": each["rows_per_second"] / each["workers"] / one} for each in figures]
    Console(width=110).print((throughput_table if options.throughput else layer_table)(figures))
    if options.trace:
        Console(width=110).print(trace_table(figures))
    name = options.name or ("expert_throughput" if options.throughput else "expert_layer")
    console.print(f"written to {write(name, machine, vars(options), figures)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--throughput", action="store_true", help="rows per second by number of workers")
    parser.add_argument("--trace", action="store_true", help="show where the time of a layer goes")
    parser.add_argument("--tokens", type=int, default=64, metavar="T")
    parser.add_argument("--top-k", type=int, default=8, metavar="K")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D")
    parser.add_argument("--expert-size", type=int, default=768, metavar="F")
    parser.add_argument("--experts", type=int, default=128, metavar="E")
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="2; 1 2 4 8 with --throughput")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each worker; 1")
    parser.add_argument("--grpc", action="store_true", help="over gRPC, as between hosts, and not over local links")
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="measured layers; 100")
    parser.add_argument("--warmup", type=int, default=5, metavar="N")
    parser.add_argument("--in-flight", type=int, default=2, metavar="N", help="layers at once with --throughput; 2")
    parser.add_argument("--name", help="of the result, bench/results/NAME.json")
    options = parser.parse_args(arguments)
    options.workers = options.workers or ([1, 2, 4, 8] if options.throughput else [2])
    return options


if __name__ == "__main__":
    sys.exit(main())
