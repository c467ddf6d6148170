"""A section of bench.gpu: a whole model whose experts are in two worker processes, which share the gateway's GPU.

Rows reach them in three ways: in the GPU's memory, whole steps at a time; by local links, by way of the host; by gRPC.
Without MPS there is no first way. The gateway's half is gateway.gpu's model, without its engine and without HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.gpu_decode import QWEN3, TOY, Sizes, decode, fill, prompt, release, speed_table, told
from bench.gpu_texts import Texts, device_model, random_text
from bench.layer_stack import Gateway, connected, expert_workers
from consilium.checkpoint import Checkpoint
from consilium.errors import ConsiliumError
from consilium.models import resolve_model
from gateway.device_hop import DeviceHop
from gateway.device_hops import DeviceHops
from gateway.gpu.experts import DispatchedExperts
from gateway.gpu.model import DeviceModel

THREADS, MOST_TOKENS, MOST_TOY_TOKENS = 4, 2048, 12  # of a step through the GPU's memory
WAIT_SECONDS, OPEN_SECONDS = 2.0, 150.0
WAYS = ("device memory", "local links", "gRPC")
CHECKED, CHECKED_STEPS = 70, 4  # tokens of a prompt, and how many more, whose bits are compared


@dataclass(slots=True)
class Stack:
    """What is measured with."""

    sizes: Sizes
    device: torch.device
    checkpoint: Checkpoint
    hops: DeviceHops
    addresses: list[str]
    console: Console


def run(toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Raises RuntimeError where a way fails, has other bits than the others, or where steps left it."""
    sizes = replace(TOY, prompts=(12,)) if toy else replace(QWEN3, prompts=(512, 2048))
    device, bits = torch.device("cpu" if toy else "cuda"), dict[str, Tensor]()
    found, wrong = dict[str, dict[str, list[Any]]](), dict[str, str]()
    with _stack(sizes, device, console) as stack:
        for way in WAYS:
            found[way] = {}
            try:
                for part, figures in _measure(stack, way, bits):
                    found[way].setdefault(part, []).append(figures)
                    console.log(f"{way}, {part}: {told(figures)}")
                    keep({"layers": stack.checkpoint.config.num_layers, "ways": found})
            except torch.AcceleratorError:
                raise  # nothing more can be done with this GPU here
            except (ConsiliumError, RuntimeError) as error:
                wrong[way] = f"{type(error).__name__}: {error}"
                console.log(f"{way}: {wrong[way]}")
            keep({"wrong": wrong})
            console.print(speed_table(f"{sizes.model}, experts in two workers, {way}", found[way]))
            release(device)
    odd = [way for way in bits if not torch.equal(bits[way], next(iter(bits.values())))]
    if odd or wrong:
        raise RuntimeError(f"other bits than by {next(iter(bits), None)}: {odd}; not measured: {wrong}")


@contextmanager
def _stack(sizes: Sizes, device: torch.device, console: Console) -> Iterator[Stack]:
    folder = resolve_model(sizes.model)
    checkpoint, started = Checkpoint(folder), time.monotonic()
    with ExitStack() as cleanup:
        dtypes, toy = (torch.int8, torch.bfloat16), device.type == "cpu"
        most, wait = (MOST_TOY_TOKENS, 20 * WAIT_SECONDS) if toy else (MOST_TOKENS, WAIT_SECONDS)
        hops = DeviceHops(checkpoint.config, most, dtypes, device, wait)
        cleanup.callback(hops.close)  # after the workers have gone
        workers = cleanup.enter_context(expert_workers(folder, 2, THREADS, "cuda", "bench.random_worker"))
        console.log(f"two workers listen after {time.monotonic() - started:.0f} s")
        yield Stack(sizes, device, checkpoint, hops, [each.address for each in workers], console)


def _measure(stack: Stack, way: str, bits: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of steps that decode, and of prompts, in one way; ``bits`` gets hidden states that went so."""
    sizes, device, checkpoint, hops = stack.sizes, stack.device, stack.checkpoint, stack.hops
    through = way == WAYS[0]
    with connected(checkpoint.folder, stack.addresses, way != "gRPC", follow=hops.follow) as gateway:
        model = _model(stack, gateway, hops if through else None)
        hop = _opened(hops, gateway) if through else None
        steps = 0 if hop is None else hop.steps
        stack.console.log(f"{way}: the model is there")
        texts, vocabulary = Texts(model, model.pool, _drive(gateway)), checkpoint.config.vocab_size
        bits[way] = _hidden(texts, vocabulary, min(CHECKED, max(sizes.prompts)))
        for batch in sizes.batches:
            yield "decode", decode(texts, vocabulary, sizes, batch, device)
        for length in sizes.prompts:
            yield "prompts", prompt(texts, vocabulary, length, device)
        if hop is not None and (hops.current() is not hop or hop.steps == steps):
            raise RuntimeError(f"steps have left the GPU's memory: {hop.lost}")


def _model(stack: Stack, gateway: Gateway, hops: DeviceHops | None) -> DeviceModel:
    experts = DispatchedExperts(gateway.dispatcher, gateway.dispatcher.clock)
    model = device_model(stack.checkpoint, stack.device, torch.bfloat16, stack.sizes.memory, experts)
    model.hops = hops
    fill(model, stack.checkpoint.config.num_layers)
    return model


def _drive(gateway: Gateway) -> Callable[[Coroutine[Any, None, Tensor]], Tensor]:
    """As the engine: it hears of what came, the answers to whole steps, before it begins another one."""

    def drive(step: Coroutine[Any, None, Tensor]) -> Tensor:
        while gateway.mailbox.receive(0):
            pass
        return gateway.mailbox.drive(step)

    return drive


def _opened(hops: DeviceHops, gateway: Gateway) -> DeviceHop:
    """The arena, when all workers have it. Raises RuntimeError when that takes too long."""
    deadline = time.monotonic() + OPEN_SECONDS
    while (hop := hops.current()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no arena after {OPEN_SECONDS:g} s; is MPS running? See the workers' logs")
        gateway.mailbox.receive(0.1)
    return hop


def _hidden(texts: Texts, vocabulary: int, length: int) -> Tensor:
    """Hidden states [T, D] of a prompt and of tokens one by one: what is recorded, too."""
    text = texts.start(random_text(length, vocabulary, 5), length)
    found = [texts.step([(text, length - CHECKED_STEPS)])]
    found += [texts.step([(text, 1)]).clone() for _ in range(CHECKED_STEPS)]
    texts.end([text])
    return torch.cat(found)
