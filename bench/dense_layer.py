"""The gateway's own part of a layer in decoding: norms, projections, attention, on weights that no cache holds.

`python -m bench.dense_layer` prints a table and writes bench/results/dense_layer.json: milliseconds a layer in one
kernel, as it is served, and the same kernels one after the other. The layers of the model take turns, so that
each reads its weights, keys and values from memory; so do the two ways, and a machine's slow minute is in both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import describe
from bench.report import write
from consilium.checkpoint import Checkpoint
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.models import resolve_model
from consilium.rope import Rope
from gateway.attention import Attention
from gateway.batch import Batch, Segment
from gateway.fused_attention import FusedAttention
from gateway.kv_cache import KVCache, KVPool
from gateway.linear import LinearMaker
from gateway.norm import RMSNorm

WAYS = ("one kernel", "one after the other")


class Layer:
    """One layer up to its experts."""

    def __init__(self, checkpoint: Checkpoint, layer: int, product: IntegerProduct) -> None:
        names = checkpoint.names
        self._before, self._after = (
            RMSNorm(checkpoint, name.format(layer=layer), torch.float32) for name in (names.input_norm, names.post_norm)
        )
        self._attention = Attention(checkpoint, layer, LinearMaker(torch.float32, product))
        self._fused = FusedAttention(self._before, self._attention, self._after, product)
        self.weight_bytes = self._fused.weight_bytes

    def run(self, way: str, x: Tensor, batch: Batch) -> None:
        if way == "one kernel":
            self._fused.forward(x, batch)
            return
        self._after.forward(x + self._attention.forward(self._before.forward(x), batch))


def measure(
    layers: Sequence[Layer], checkpoint: Checkpoint, rows: int, options: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds a layer by way, medians of the passes through all layers."""
    config = checkpoint.config
    pool, room = KVPool(config, torch.float32, 2**36), options.positions + 2 * options.passes + 2
    caches = [pool.allocate(room, room) for _ in range(rows)]
    for cache in caches:  # a page that was never written is read from nowhere
        cache.keys.fill_(0.1)
        cache.values.fill_(0.2)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(options.passes + 2):
        for way in WAYS if number % 2 else reversed(WAYS):
            batch = _batch(checkpoint, caches, options.positions + number)
            x = torch.randn(rows, config.hidden_size)
            started = time.perf_counter()
            for layer in layers:
                layer.run(way, x, batch)
            seconds[way].append((time.perf_counter() - started) / len(layers))
    return {way: 1e3 * statistics.median(found[2:]) for way, found in seconds.items()}


def _batch(checkpoint: Checkpoint, caches: list[KVCache], position: int) -> Batch:
    segments = [Segment(cache, row, 1, position) for row, cache in enumerate(caches)]
    cos, sin = Rope(checkpoint.config).tables(torch.full((len(caches),), position))
    return Batch(torch.zeros(len(caches), dtype=torch.int64), segments, cos, sin)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    machine, checkpoint = describe(), Checkpoint(resolve_model(options.model))
    with torch.inference_mode():
        product, count = find_integer_product(), min(options.layers, checkpoint.config.num_layers)
        layers = [Layer(checkpoint, number, product) for number in range(count)]
        found = {rows: measure(layers, checkpoint, rows, options) for rows in options.rows}
    weights = layers[0].weight_bytes
    caption = f"ms a layer; its projections are {weights / 1e6:.1f} MB; {options.positions} positions a sequence"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("sequences", *WAYS):
        table.add_column(heading, justify="right")
    for rows, figures in found.items():
        table.add_row(str(rows), *(f"{figures[way]:.2f}" for way in WAYS))
    Console().print(table)
    result = {"milliseconds": found, "weight_bytes": weights}
    print(f"written to {write(options.name, machine, vars(options), result)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.dense_layer", description=__doc__)
    parser.add_argument("--model", default="shape:olmoe-1b-7b", help="folder, name or shape; shape:olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="most layers that take turns")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="sequences")
    parser.add_argument(
        "--positions", type=int, default=100, metavar="N", help="of each sequence before the first step"
    )
    parser.add_argument("--passes", type=int, default=20, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--name", default="dense_layer", help="of the result, bench/results/NAME.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
