"""A section of bench.gpu: a layer's experts on a GPU, kernel by kernel.

Letters: T tokens, K experts of each, P = T · K pairs, E experts, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from consilium.arithmetics import find_arithmetic
from consilium.config import Quantization
from consilium.errors import ConsiliumError
from consilium.gpu.experts import ExpertForm, compute, down, gate_up
from consilium.gpu.samples import Layer, Tokens, random_layer, random_tokens
from consilium.gpu.sort import sort_pairs
from consilium.gpu.tiling import Tiling, batch_of, nearest
from consilium.gpu.timing import seconds_of
from consilium.gpu.tuned import tilings_for
from consilium.gpu.upload import Uploader
from expert_service.device_proof import prove

FORMS: dict[Quantization, tuple[torch.dtype, torch.dtype]] = {  # of rows and weights
    "int8": (torch.int8, torch.int8),
    "int8-weight-only": (torch.bfloat16, torch.int8),
    "none": (torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a layer, and of what is asked of it."""

    hidden: int
    expert_size: int
    experts: int
    top_k: int
    tokens: Sequence[int]
    of_a_worker: Sequence[int]  # tokens again
    calls: int
    product: int  # rows and columns of the matrices whose product shows what the device can do
    copied: int  # bytes that show how fast its memory is


QWEN3 = Sizes(2048, 768, 128, 8, (1, 8, 32, 64, 128, 512, 4096), (1, 8, 64), 200, 8192, 2**31)
TOY = Sizes(64, 32, 4, 2, (1, 3), (2,), 3, 64, 2**16)


def run(toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Raises RuntimeError where kernels are wrong, or fail; the others are measured all the same."""
    sizes, device = TOY if toy else QWEN3, torch.device("cpu" if toy else "cuda")
    best = ceilings(sizes, device)
    console.log(
        f"copies: {best['bytes_per_second'] / 1e12:.2f} TB/s; "
        + ", ".join(f"{name} products: {rate / 1e12:.0f} T/s" for name, rate in best["operations_per_second"].items())
    )
    keep({"sizes": vars_of(sizes), "ceilings": best})
    kernels, wrong = dict[str, Sequence[dict[str, Any]]](), dict[str, str]()
    for name in FORMS:
        try:
            check(sizes, name, device)
            console.log(f"{name}: {'the bits of the CPU' if name == 'int8' else 'close to the CPU'}")
            kernels[name] = measure(sizes, name, device, best)
        except torch.AcceleratorError:
            raise  # nothing more can be done with this GPU here
        except (ConsiliumError, RuntimeError) as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            console.log(f"{name}: {wrong[name]}")
        else:
            console.print(kernel_table(name, kernels[name]))
        keep({"kernels": kernels, "wrong": wrong})
    if wrong:
        raise RuntimeError(f"wrong, or not measured: {wrong}")
    memory = {name: figures[0]["layer_bytes"] for name, figures in kernels.items()}
    console.print(f"memory of a layer, int8 against bfloat16: {memory['int8'] / memory['none']:.3f}")


def vars_of(sizes: Sizes) -> dict[str, Any]:
    return {name: getattr(sizes, name) for name in Sizes.__slots__}


def check(sizes: Sizes, quantization: Quantization, device: torch.device) -> None:
    """Raises ConsiliumError where a tiling computes something wrong; compiles what is measured."""
    host = find_arithmetic(quantization, "bfloat16", sizes.hidden, sizes.expert_size)
    form = form_for(sizes, quantization)
    prove(host, form, tilings_for(form, device), device, Uploader(device).upload)


def form_for(sizes: Sizes, quantization: Quantization) -> ExpertForm:
    return ExpertForm(sizes.hidden, sizes.expert_size, *FORMS[quantization], torch.bfloat16)


def ceilings(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Bytes read and written by a copy, and multiplies and adds of library products, for a second."""
    source = torch.randint(0, 255, (sizes.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = seconds_of([partial(target.copy_, source)], device)
    square = (sizes.product, sizes.product)
    integers = torch.randint(-127, 128, square, dtype=torch.int8, device=device)
    halves = torch.randn(square, device=device).bfloat16()
    products = {
        "int8": seconds_of([partial(torch._int_mm, integers, integers.T)], device),
        "bfloat16": seconds_of([partial(torch.mm, halves, halves.T)], device),
    }
    operations = {name: 2 * sizes.product**3 / seconds for name, seconds in products.items()}
    return {"bytes_per_second": 2 * sizes.copied / copied, "operations_per_second": operations}


def measure(
    sizes: Sizes, quantization: Quantization, device: torch.device, best: dict[str, Any]
) -> Sequence[dict[str, Any]]:
    """The figures of every number of tokens."""
    form = form_for(sizes, quantization)
    layer = random_layer(form, sizes.experts, device)
    rate = best["operations_per_second"]["int8" if form.rows is torch.int8 else "bfloat16"]
    found = []
    for count in sizes.tokens:
        batches = random_tokens(layer, count, sizes.top_k)
        tiling = nearest(tilings_for(form, device), batch_of(count * sizes.top_k, sizes.experts))
        moved = sum(least_bytes(layer, each) for each in batches) / len(batches)
        operations = 6 * count * sizes.top_k * sizes.hidden * sizes.expert_size
        floor = max(moved / best["bytes_per_second"], operations / rate)
        seconds = times(layer, tiling, batches)
        whole = seconds["all"]
        found.append(
            {
                "tokens": count,
                "tiling": str(tiling),
                "seconds": seconds,
                "bytes": moved,
                "bytes_per_second": moved / whole,
                "operations_per_second": operations / whole,
                "floor_seconds": floor,
                "of_floor": whole / floor,
                "layer_bytes": layer.expert_bytes * sizes.experts,
            }
        )
    return found


def least_bytes(layer: Layer, tokens: Tokens) -> int:
    """Every weight that is used and every row once, in and out."""
    out = tokens.ids.numel() * layer.form.hidden_size * layer.form.replies.itemsize
    return len(tokens.ids.unique()) * layer.expert_bytes + tokens.rows.nbytes + out


def times(layer: Layer, tiling: Tiling, batches: Sequence[Tokens]) -> dict[str, float]:
    """Seconds of each kernel, and of all in a row."""
    form, table, device = layer.form, layer.table, layer.table.device
    calls: dict[str, list[Callable[[], object]]] = {"sort": [], "gate_up": [], "down": [], "all": []}
    for tokens in batches:
        groups = sort_pairs(tokens.ids, table, tiling.block_m)
        rows = (tokens.rows, tokens.scales)
        hidden, largest = gate_up(form, tiling.gate_up, table, groups, *rows)
        out = torch.empty(tokens.ids.numel(), form.hidden_size, dtype=form.replies, device=device)
        given = hidden, None if tiling.quantize_first else largest, out
        calls["sort"].append(partial(sort_pairs, tokens.ids, table, tiling.block_m))
        calls["gate_up"].append(partial(gate_up, form, tiling.gate_up, table, groups, *rows))
        calls["down"].append(partial(down, form, tiling.down, table, groups, *given))
        calls["all"].append(partial(_whole, layer, tiling, tokens, out))
    return {name: seconds_of(some, device) for name, some in calls.items()}


def _whole(layer: Layer, tiling: Tiling, tokens: Tokens, out: torch.Tensor) -> None:
    groups = sort_pairs(tokens.ids, layer.table, tiling.block_m)
    compute(layer.form, tiling, layer.table, groups, tokens.rows, tokens.scales, out)


def kernel_table(name: str, figures: Sequence[dict[str, Any]]) -> Table:
    """Times in us."""
    caption = "us; floor: the fewest bytes or operations at what a copy and a library's product reach here"
    table = Table(title=name, box=box.SIMPLE_HEAD, caption=caption)
    for heading in ("tokens", "all", "sort", "gate, up", "down", "TB/s", "T/s", "floor", "x floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        seconds = [f"{each['seconds'][part] * 1e6:.1f}" for part in ("all", "sort", "gate_up", "down")]
        rates = [f"{each['bytes_per_second'] / 1e12:.2f}", f"{each['operations_per_second'] / 1e12:.1f}"]
        table.add_row(
            str(each["tokens"]), *seconds, *rates, f"{each['floor_seconds'] * 1e6:.1f}", f"{each['of_floor']:.2f}"
        )
    return table
