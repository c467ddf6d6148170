"""A section of bench.gpu: one routed layer through a worker whose experts are on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.expert_layer import single_layers
from bench.gpu_experts import QWEN3, TOY, Sizes, vars_of
from bench.layer_stack import LayerShape, connected, expert_workers, random_layer, random_routing


def run(toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """The worker itself holds its kernels against the CPU's before it listens."""
    sizes, figures = TOY if toy else QWEN3, list[dict[str, Any]]()
    keep({"sizes": vars_of(sizes), "layers": figures})
    for each in measure(sizes):
        figures.append(each)
        console.log(f"{each['link']}, {each['tokens']} tokens")
        keep({"layers": figures})
    console.print(layer_table(figures))


def measure(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """One routed layer as the gateway has it, from rows on the host: over a local link, and over gRPC."""
    shape = LayerShape(sizes.hidden, sizes.expert_size, sizes.experts, sizes.top_k)
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    with random_layer(shape) as model, expert_workers(model, 1, 4, "cuda") as workers:
        for local in (True, False):
            with connected(model, [each.address for each in workers], local) as gateway:
                for count in sizes.of_a_worker:
                    inputs = [
                        (torch.randn(count, sizes.hidden, generator=generator), random_routing(shape, count, random))
                        for _ in range(8)
                    ]
                    single_layers(gateway, inputs, max(1, sizes.calls // 10))
                    figures = single_layers(gateway, inputs, sizes.calls)
                    yield {"link": "local" if local else "gRPC", "tokens": count, **figures}


def layer_table(figures: Sequence[dict[str, Any]]) -> Table:
    """Times in ms."""
    caption = "ms, p50/p95; of the worker: what its answers say that computing took"
    table = Table(title="one routed layer through a worker", box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("link", "tokens", "layer", "of the worker"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        parts = [f"{each[part]['p50'] * 1e3:.3f}/{each[part]['p95'] * 1e3:.3f}" for part in ("layer", "experts")]
        table.add_row(each["link"], str(each["tokens"]), *parts)
    return table
