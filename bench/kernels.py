"""The int8 expert kernels on cold weights, beside what bounds them and what else there is: by model and rows.

`python -m bench.kernels` prints a table and writes bench/results/kernels.json. Cold: every call takes the next of so
many experts that none is in a cache when its turn comes. GB/s counts the weights read once, GF/s two operations for
each product. "copy" is the speed at which memory is read while it is copied, the bound for few rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import describe
from bench.report import write
from consilium.experts import ExpertWeights
from consilium.int8_experts import Int8Arithmetic
from consilium.integer_product import IntegerProduct, find_integer_product, torch_product
from consilium.quantization import Quantized, quantize_rows

SHAPES = {  # hidden size, expert FFN size
    "default": (576, 176),
    "qwen3-30b-a3b": (2048, 768),
    "olmoe-1b-7b": (2048, 1024),
    "mixtral-8x7b": (4096, 14336),
}
COLD = 2**28  # bytes of weights that push each other out of every cache


def random_expert(hidden: int, size: int, generator: torch.Generator) -> ExpertWeights:
    """An int8 expert of random weights."""

    def matrix(rows: int, columns: int) -> Quantized:
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        return Quantized(values, torch.rand(rows, generator=generator) / 1000)

    return ExpertWeights(matrix(size, hidden), matrix(size, hidden), matrix(hidden, size))


def seconds(compute: Callable[[int], object], rounds: int, repeats: int) -> float:
    """The best mean time of ``compute(i)`` over ``repeats`` times ``rounds`` calls."""
    compute(0)
    best = float("inf")
    for repeat in range(repeats):
        start = time.perf_counter()
        for each in range(rounds):
            compute(repeat * rounds + each)
        best = min(best, (time.perf_counter() - start) / rounds)
    return best


def ways(
    product: IntegerProduct, experts: list[ExpertWeights], rows: Quantized, x: Tensor
) -> dict[str, Callable[[int], object]]:
    """Every way to compute expert i, by name."""
    count = len(rows.values)

    def arithmetic(*, many: bool) -> Int8Arithmetic:
        return Int8Arithmetic(torch.float32, IntegerProduct(product.kind, torch_product if many else None, many_rows=1))

    def int8(one: Int8Arithmetic, i: int) -> object:
        return one.compute([experts[i % len(experts)]], [0, count], rows.values, rows.scales)

    hidden, size = x.shape[1], experts[0].nbytes() // (3 * x.shape[1])

    def products_in(dtype: torch.dtype) -> Callable[[int], object]:
        """The three products of an expert alone, without what is between them."""
        matrices = max(3, COLD // (hidden * size * dtype.itemsize))
        weights = [torch.randn(size, hidden).to(dtype) for _ in range(matrices)]
        inputs = x.to(dtype)
        return lambda i: [torch.nn.functional.linear(inputs, weights[(3 * i + j) % matrices]) for j in range(3)]

    return {
        "kernel": partial(int8, arithmetic(many=False)),
        "torch._int_mm": partial(int8, arithmetic(many=True)),
        "torch float32": products_in(torch.float32),
        "torch bfloat16": products_in(torch.bfloat16),
    }


def measure(name: str, rows: int, product: IntegerProduct, experts: list[ExpertWeights]) -> dict[str, Any]:
    """Seconds of every way, for one expert of the model with so many rows."""
    hidden, size = SHAPES[name]
    x = torch.randn(rows, hidden)
    work = 2 * rows * 3 * hidden * size
    rounds = max(1, min(len(experts), int(4e9 / work)))
    found = {way: seconds(call, rounds, 3) for way, call in ways(product, experts, quantize_rows(x), x).items()}
    return {"model": name, "rows": rows, "weight_bytes": 3 * hidden * size, "operations": work, "seconds": found}


def copy_speed() -> float:
    """Bytes a second at which memory is read while it is copied, on this number of threads."""
    source, target = torch.ones(COLD, dtype=torch.int8), torch.zeros(COLD, dtype=torch.int8)
    return COLD / seconds(lambda _: target.copy_(source), 1, 5)


def show(figures: list[dict[str, Any]], copy: float) -> None:
    """A row for each model and number of rows."""
    names = list(figures[0]["seconds"])
    table = Table(
        "model", "rows", *names, "kernel GB/s", "kernel GF/s", caption=f"µs; copy reads {copy / 1e9:.1f} GB/s"
    )
    for each in figures:
        kernel = each["seconds"]["kernel"]
        speeds = f"{each['weight_bytes'] / kernel / 1e9:.1f}", f"{each['operations'] / kernel / 1e9:.0f}"
        table.add_row(
            each["model"], str(each["rows"]), *(f"{each['seconds'][way] * 1e6:.0f}" for way in names), *speeds
        )
    Console().print(table)


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256], metavar="M")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, product, figures = describe(), find_integer_product(), []
    copy = copy_speed()
    for name in options.models:
        hidden, size = SHAPES[name]
        count = max(2, COLD // (3 * hidden * size))
        experts = [random_expert(hidden, size, torch.Generator().manual_seed(each)) for each in range(count)]
        for rows in options.rows:
            figures.append(measure(name, rows, product, experts))
            print(f"{name} {rows} rows", file=sys.stderr)
    show(figures, copy)
    found = {"copy_bytes_per_second": copy, "product": product.name, "experts": figures}
    print(f"written to {write('kernels', machine, vars(options), found)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
