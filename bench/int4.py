"""Experts in int4 beside the same experts in int8, on cold weights: by model, rows and group.

`python -m bench.int4` prints a table and writes bench/results/int4.json. GB/s counts weights and scales read once.
"decode" is one token's experts of a whole model, one thread, nothing else: layers times experts per token, cold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.kernels import COLD, SHAPES, copy_speed, random_expert, seconds
from bench.machine import describe
from bench.report import write
from consilium.experts import Arithmetic, ExpertWeights
from consilium.int4 import Int4
from consilium.int4_experts import Int4Arithmetic
from consilium.int4_proof import find_grouped_product
from consilium.int8_experts import Int8Arithmetic
from consilium.integer_product import find_integer_product
from consilium.quantization import quantize_rows

EXPERTS_PER_TOKEN = {"default": 30 * 8, "qwen3-30b-a3b": 48 * 8, "olmoe-1b-7b": 16 * 8, "mixtral-8x7b": 32 * 2}


def random_int4(hidden: int, size: int, group: int, generator: torch.Generator) -> ExpertWeights:
    """An int4 expert of random weights."""

    def matrix(rows: int, columns: int) -> Int4:
        blocks, groups = -(-rows // 16), -(-columns // group)
        values = torch.randint(-(2**31), 2**31, (blocks, columns // 8, 16), generator=generator).to(torch.int32)
        return Int4(values, torch.rand(blocks, groups, 16, generator=generator) / 100, rows, group)

    return ExpertWeights(matrix(size, hidden), matrix(size, hidden), matrix(hidden, size))


def measure(arithmetic: Arithmetic, experts: list[ExpertWeights], rows: int, hidden: int) -> dict[str, float]:
    """Seconds and bytes of one cold expert with so many rows."""
    x = quantize_rows(torch.randn(rows, hidden))

    def compute(i: int) -> object:
        return arithmetic.compute([experts[i % len(experts)]], [0, rows], x.values, x.scales)

    rounds = max(1, min(len(experts), 256 // rows))
    return {"seconds": seconds(compute, rounds, 3), "bytes": experts[0].nbytes()}


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.int4", description=__doc__)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=["default", "olmoe-1b-7b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16, 64, 256], metavar="M")
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128], metavar="G")
    options = parser.parse_args()
    torch.set_num_threads(1)
    int8 = Int8Arithmetic(torch.bfloat16, find_integer_product())
    int4 = Int4Arithmetic(torch.bfloat16, find_grouped_product())
    machine, copy = describe(), copy_speed()
    figures: list[dict[str, Any]] = []
    for name in options.models:
        hidden, size = SHAPES[name]
        makers: dict[str, tuple[Arithmetic, Callable[[torch.Generator], ExpertWeights]]] = {
            "int8": (int8, partial(random_expert, hidden, size))
        }
        makers |= {f"int4, {group}": (int4, partial(random_int4, hidden, size, group)) for group in options.groups}
        for way, (arithmetic, make) in makers.items():
            count = max(2, COLD // make(torch.Generator()).nbytes())
            experts = [make(torch.Generator().manual_seed(each)) for each in range(count)]
            figures += [
                {"model": name, "way": way, "rows": rows, **measure(arithmetic, experts, rows, hidden)}
                for rows in options.rows
            ]
            print(f"{name} {way}", file=sys.stderr)
    show(figures, copy)
    found = {"copy_bytes_per_second": copy, "experts": figures}
    print(f"written to {write('int4', machine, vars(options), found)}", file=sys.stderr)
    return 0


def show(figures: list[dict[str, Any]], copy: float) -> None:
    """A row for each model, way and number of rows."""
    base = {(each["model"], each["rows"]): each["seconds"] for each in figures if each["way"] == "int8"}
    columns = ("model", "weights", "rows", "µs", "GB/s", "speed of int8", "decode, tokens/s")
    table = Table(*columns, caption=f"copy reads {copy / 1e9:.1f} GB/s")
    for each in figures:
        time, name, rows = each["seconds"], each["model"], each["rows"]
        decode = f"{1 / (time * EXPERTS_PER_TOKEN[name]):.1f}" if rows == 1 else ""
        speed = f"{each['bytes'] / time / 1e9:.1f}", f"{base[name, rows] / time:.2f}", decode
        table.add_row(name, each["way"], str(rows), f"{time * 1e6:.0f}", *speed)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
