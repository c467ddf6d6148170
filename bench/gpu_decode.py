"""A section of bench.gpu: a whole model in one process on a GPU, decoding and reading prompts.

Letters: T rows of the step, K experts per token.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.gpu_texts import Texts, check_bits, device_model, difference_from_cpu, random_text
from consilium.checkpoint import Checkpoint
from consilium.gpu.experts import ExpertForm
from consilium.gpu.samples import random_layer
from consilium.models import resolve_model
from gateway.gpu.experts import OwnExperts
from gateway.gpu.model import DeviceModel
from gateway.gpu.tiling import FAST, INVARIANT

MODES = {"batch-invariant": INVARIANT, "fast": FAST}
NEAR = 1e-3  # mean difference of log-probabilities from the CPU's
KERNELS = 12  # shown of a step


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model, and of what is asked of it."""

    model: str
    memory: int  # bytes for keys and values
    context: int  # tokens before the first that is decoded
    batches: tuple[int, ...]
    steps: int
    prompts: tuple[int, ...]
    checked: tuple[int, ...]  # tokens of the texts whose bits are checked


QWEN3 = Sizes(
    "shape:qwen3-30b-a3b",
    24 * 2**30,
    1024,
    (1, 8, 32, 128),
    32,
    (512, 2048, 8192),
    (2200, 70, 600),
)
TOY = Sizes("shape:tiny,layers=2", 2**22, 20, (1, 3), 2, (20,), (18, 7))


def run(toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Raises RuntimeError where a bit is wrong."""
    sizes, device = TOY if toy else QWEN3, torch.device("cpu" if toy else "cuda")
    difference = difference_from_cpu(TOY.model, device, 12)
    keep({"difference_from_cpu": difference})
    if not difference < NEAR:
        raise RuntimeError(f"log-probabilities differ by {difference:.2g} on average from the CPU's")
    console.log(f"{TOY.model}: {difference:.1g} from the CPU on average")
    checkpoint = Checkpoint(resolve_model(sizes.model))
    experts, modes = random_experts(checkpoint, device), dict[str, dict[str, Any]]()
    for name, tilings in MODES.items():
        modes[name] = {}
        keep({"modes": modes})
        model = device_model(checkpoint, device, torch.bfloat16, sizes.memory, experts, tilings)
        fill(model, checkpoint.config.num_layers)
        console.log(f"{sizes.model}, {name}: the model is there")
        if tilings is INVARIANT:
            check_bits(model, checkpoint.config.vocab_size, sizes.checked, 4)
            console.log("the same bits in prompts, chunks and batches")
        for part, figures in measure(Texts(model, model.pool), checkpoint.config.vocab_size, sizes, device):
            modes[name].setdefault(part, []).append(figures)
            console.log(f"{name}, {part}: {told(figures)}")
            keep({"modes": modes})
        console.print(speed_table(f"{sizes.model}, experts in the process, {name}", modes[name]))
        del model
        release(device)


def random_experts(checkpoint: Checkpoint, device: torch.device) -> OwnExperts:
    """Of the model's sizes, made on the device: those of the shape would take minutes to make on the CPU."""
    config = checkpoint.config
    form = ExpertForm(config.hidden_size, config.expert_size, torch.int8, torch.int8, torch.bfloat16)
    layers = {layer: random_layer(form, config.num_experts, device).experts for layer in config.expert_layers()}
    return OwnExperts(form, layers, device)


def fill(model: DeviceModel, layers: int) -> None:
    """Random keys and values: products of zeros take less power, and so may be faster."""
    for layer in range(layers):
        for tensor in model.pool.layer(layer):
            tensor.normal_()


def measure(texts: Texts, vocabulary: int, sizes: Sizes, device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of steps that decode, and of prompts; then where the time of a step goes."""
    for batch in sizes.batches:
        yield "decode", decode(texts, vocabulary, sizes, batch, device)
    for length in sizes.prompts:
        yield "prompts", prompt(texts, vocabulary, length, device)
    for batch in sizes.batches if device.type == "cuda" else ():
        yield "kernels", {"batch": batch, "kernels": kernels(texts, vocabulary, sizes, batch)}


def told(figures: dict[str, Any]) -> str:
    """In a line."""
    if "kernels" in figures:
        spent = figures["kernels"]
        parts = (f"{name[:40]} {seconds * 1e6:.0f}" for name, seconds in list(spent.items())[:KERNELS])
        return f"{figures['batch']}: {sum(spent.values()) * 1e6:.0f} us in kernels: {', '.join(parts)}"
    count = figures.get("batch", figures.get("tokens"))
    return f"{count}: {figures['seconds'] * 1e3:.2f} ms, {figures['tokens_per_second']:.0f} tok/s"


@contextmanager
def _decoding(texts: Texts, vocabulary: int, sizes: Sizes, batch: int) -> Iterator[list[Any]]:
    """Texts with keys and values for ``sizes.context`` tokens, of which the next is to be decoded."""
    room = sizes.context + sizes.steps + 8
    started = [texts.start(random_text(sizes.context + 1, vocabulary, seed), room) for seed in range(batch)]
    for text in started:
        text.computed = sizes.context
    yield started
    texts.end(started)


def decode(texts: Texts, vocabulary: int, sizes: Sizes, batch: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, the choice of tokens included."""
    with _decoding(texts, vocabulary, sizes, batch) as started:
        for _ in range(4):  # compiled, recorded, replayed
            texts.decode(started)
        seconds = [timed(lambda: texts.decode(started), device) for _ in range(sizes.steps)]
    median = statistics.median(seconds)
    return {"batch": batch, "context": sizes.context, "seconds": median, "tokens_per_second": batch / median}


def prompt(texts: Texts, vocabulary: int, length: int, device: torch.device) -> dict[str, Any]:
    """Seconds of a prompt in one step."""
    seconds = []
    for seed in range(4):
        text = texts.start(random_text(length, vocabulary, seed), length)
        seconds.append(timed(lambda text=text: texts.step([(text, length)]), device))
        texts.end([text])
    best = statistics.median(seconds[1:])
    return {"tokens": length, "seconds": best, "tokens_per_second": length / best}


def kernels(texts: Texts, vocabulary: int, sizes: Sizes, batch: int) -> dict[str, float]:
    """Seconds of a decoding step in each kernel, the longest first."""
    spent: dict[str, float] = defaultdict(float)
    with _decoding(texts, vocabulary, sizes, batch) as started:
        for _ in range(3):
            texts.decode(started)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                texts.decode(started)
            torch.cuda.synchronize()
    for event in profile.key_averages():
        spent[event.key] += event.self_device_time_total / 1e6 / 3
    return dict(sorted(spent.items(), key=lambda each: -each[1]))


def timed(call: Any, device: torch.device) -> float:
    """Seconds until the device has done it."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def release(device: torch.device) -> None:
    """What the last model had is free for the next one: two of them do not fit."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def speed_table(title: str, figures: dict[str, Any]) -> Table:
    """Tokens a second."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("", "tokens", "ms", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, key in (("decode", "batch"), ("prompts", "tokens")):
        for each in figures.get(kind, []):
            row = f"{each['seconds'] * 1e3:.2f}", f"{each['tokens_per_second']:.0f}"
            table.add_row("a step of" if kind == "decode" else "a prompt of", str(each[key]), *row)
    return table
