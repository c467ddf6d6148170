"""A section of bench.gpu: what it costs to hand a layer to processes on the same GPU, or on the one beside it.

What is measured is the gateway's DeviceHop against the workers' DeviceSteps; only the packet that starts a step goes
through a pipe, not through a local link. It is measured with MPS, then, a little of it, in turns without; at last a
worker is killed in the middle of a step.

Letters: L layers, T tokens, K experts of each, E experts, D hidden size, F expert FFN size, W workers.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from consilium.errors import ConsiliumError, ExpertUnavailable
from consilium.gpu.arena import BUCKETS, ArenaShape
from consilium.gpu.experts import ExpertForm
from consilium.gpu.samples import random_layer
from consilium.gpu.tuned import tilings_for
from consilium.link_packets import ARENA, ArenaPacket, StepPacket
from expert_service.device_kernels import DeviceKernels
from expert_service.device_steps import DeviceSteps
from expert_service.store import ExpertStore
from gateway.device_hop import DeviceHop
from gateway.local_link import Times
from gateway.mailbox import Completion

WAIT_SECONDS, OPEN_SECONDS = 2.0, 120.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the layers, and of what is asked of them."""

    hidden: int
    expert_size: int
    experts: int
    top_k: int
    layers: int
    distinct: int  # layers with weights of their own; others have them again, when no cache does any more
    tokens: tuple[int, ...]
    steps: int


QWEN3 = Sizes(2048, 768, 128, 8, 24, 3, (1, 8, 64, 128), 50)
TOY = Sizes(64, 32, 4, 2, 2, 2, (1, 2), 2)


# -- a worker ----------------------------------------------------------------------------------------------------------


class NoKernels:
    """Layers that compute nothing: what is left is the way there and back."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.device, self.layers = device, range(sizes.layers)
        self._table = torch.ones(sizes.experts, 1, dtype=torch.int64, device=device)

    def refresh(self) -> None:
        """Nothing changes."""

    def table(self, layer: int) -> Tensor:  # noqa: ARG002
        return self._table

    def launch(self, layer: int, rows: Tensor, scales: Tensor | None, ids: Tensor, out: Tensor) -> None:
        """Nothing."""


def kernels_of(sizes: Sizes, device: torch.device, held: Sequence[int]) -> DeviceKernels:
    """Random experts, the same in every process."""
    form = ExpertForm(sizes.hidden, sizes.expert_size, torch.int8, torch.int8, torch.bfloat16)
    made = [random_layer(form, sizes.experts, device).experts for _ in range(sizes.distinct)]
    store = ExpertStore(range(sizes.layers))
    for layer in range(sizes.layers):
        for expert in held:
            store.add(layer, expert, made[layer % sizes.distinct][expert], b"-" * 16)
    return DeviceKernels(store, form, tilings_for(form, device), device, range(sizes.layers), sizes.experts)


def serve(connection: Connection, sizes: Sizes, device_name: str, held: Sequence[int] | None) -> None:
    """A worker's process: packets come, answers go."""
    device = torch.device(device_name)
    kernels = NoKernels(sizes, device) if held is None else kernels_of(sizes, device, held)
    steps = DeviceSteps(kernels, lambda: None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            packet = memoryview(connection.recv_bytes())
            asked = ArenaPacket.unpack(packet) if packet[0] == ARENA else StepPacket.unpack(packet)

            def answer(outcome: Exception | tuple[int, int], call_id: int = asked.call_id) -> None:
                with contextlib.suppress(OSError):
                    connection.send((call_id, str(outcome) if isinstance(outcome, Exception) else outcome))

            steps.submit(asked, answer)
    steps.close(1.0)


# -- the gateway's side ------------------------------------------------------------------------------------------------


class Peer:
    """A worker as DeviceHop asks it."""

    def __init__(self, number: int, sizes: Sizes, device: torch.device, held: Sequence[int] | None) -> None:
        context = get_context("spawn")
        self.on_end: Callable[[], None] = lambda: None  # nobody but this thread listens
        self.address, self._calls = f"worker {number}", dict[int, Completion[Times]]()
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(theirs, sizes, str(device), held), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, packet: Callable[[int], bytes], deadline: float) -> Completion[Times]:
        call_id = len(self._calls) + 1
        self._calls[call_id] = Completion(deadline, lambda: None)
        try:
            self.connection.send_bytes(packet(call_id))
        except OSError:
            self._lose()
        return self._calls[call_id]

    @property
    def is_asked(self) -> bool:
        """Whether it has an answer to give."""
        return any(each.outcome is None for each in self._calls.values())

    def take(self) -> None:
        """What it has answered."""
        try:
            while self.connection.poll(0):
                call_id, outcome = self.connection.recv()
                failed = isinstance(outcome, str)
                self._calls[call_id].settle(ExpertUnavailable(outcome) if failed else outcome)
        except (EOFError, OSError):
            self._lose()

    def _lose(self) -> None:
        for each in self._calls.values():
            each.settle(ExpertUnavailable("its process has ended"))


class Bench:
    """One arena with its workers."""

    def __init__(self, sizes: Sizes, device: torch.device, workers: Sequence[torch.device], computing: bool) -> None:
        count = len(workers)
        held = [list(range(number, sizes.experts, count)) for number in range(count)]
        self.sizes, self.device = sizes, device
        self.peers = [
            Peer(number, sizes, where, held[number] if computing else None) for number, where in enumerate(workers)
        ]
        shape = ArenaShape(
            *(sizes.layers, sizes.experts, max(sizes.tokens), sizes.top_k, sizes.hidden, count),
            rows=torch.int8,
            replies=torch.bfloat16,
        )
        self.hop = DeviceHop(shape, self.peers, device, WAIT_SECONDS * (20 if device.type == "cpu" else 1))
        self._open()
        owners = np.arange(sizes.experts, dtype=np.int32) % count
        self.hop.place(np.tile(owners, (sizes.layers, 1)))
        self.inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def close(self) -> None:
        self.hop.abort()
        for each in self.peers:
            each.connection.close()
            each.process.join(10)
            each.process.kill()
        self.hop.close()

    def step(self, tokens: int, *, meanwhile: Callable[[], None] = lambda: None) -> dict[str, Exception]:
        """All layers once; why it came to nothing."""
        self.hop.begin(tokens)
        self._launch(tokens)
        meanwhile()
        while not self._through():
            self.take()
        self.take()
        return self.hop.failed(int(self.hop.arena.broken))

    def seconds(self, tokens: int) -> list[float]:
        """Of a layer, of each of several steps. Raises RuntimeError where one fails."""
        found = []
        for _ in range(self.sizes.steps):
            started = time.perf_counter()
            failed = self.step(tokens)
            found.append((time.perf_counter() - started) / self.sizes.layers)
            if failed:
                raise RuntimeError(f"a step of {tokens} tokens failed: {failed}")
        return found

    def prepare(self, tokens: int) -> None:
        """Inputs for every layer, and the graph that sends them."""
        generator = torch.Generator().manual_seed(tokens)
        sizes = self.sizes
        ids = (
            torch.rand(sizes.layers, tokens, sizes.experts, generator=generator).topk(sizes.top_k).indices.sort().values
        )
        rows = torch.randint(-127, 128, (sizes.layers, tokens, sizes.hidden), dtype=torch.int8, generator=generator)
        scales = torch.full((sizes.layers, tokens), 1 / 73)
        self.inputs[tokens] = ids.int().to(self.device), rows.to(self.device), scales.to(self.device)
        while any(each.is_asked for each in self.peers):
            self.take()  # else a worker that looks back at the last step finds it given up
        self.hop.abort()  # nothing waits: only to load every kernel
        self._exchange(tokens)
        self._synchronize()
        self._reset()
        if self.device.type == "cuda":
            self._graphs[tokens] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graphs[tokens]):
                self._exchange(tokens)

    def take(self) -> None:
        for each in self.peers:
            each.take()

    def _launch(self, tokens: int) -> None:
        if tokens in self._graphs:
            self._graphs[tokens].replay()
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._exchange(tokens)

    def _through(self) -> bool:
        return self.device.type != "cuda" or self._event.query()

    def _exchange(self, tokens: int) -> None:
        """What a model launches in its layers, without what is its own."""
        arena, (ids, rows, scales) = self.hop.arena, self.inputs[tokens]
        for layer in range(self.sizes.layers):
            arena.ids[:tokens].copy_(ids[layer])
            arena.rows[:tokens].copy_(rows[layer])
            arena.scales[:tokens].copy_(scales[layer])
            self.hop.exchange(layer)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset(self) -> None:
        """No step is under way: the next one is the first again, whatever has been said of layers meanwhile."""
        self.hop.steps = 0
        self.hop.start()

    def _open(self) -> None:
        waiting, errors = {each.address for each in self.peers}, dict[str, Exception]()

        def told(address: str, error: Exception | None) -> None:
            waiting.discard(address)
            if error is not None:
                errors[address] = error

        self.hop.open(told)
        deadline = time.monotonic() + OPEN_SECONDS
        while waiting and time.monotonic() < deadline:
            wait([each.connection for each in self.peers], 1.0)
            self.take()
        if waiting or errors:
            raise RuntimeError(f"no arena: {errors or waiting}")
        self.hop.start()


@contextmanager
def opened(sizes: Sizes, device: torch.device, workers: Sequence[torch.device], computing: bool) -> Iterator[Bench]:
    bench = Bench(sizes, device, workers, computing)
    try:
        yield bench
    finally:
        bench.close()


# -- the sections ------------------------------------------------------------------------------------------------------

Keep = Callable[[Mapping[str, Any]], None]
Parts = Mapping[str, Callable[[], Any]]


def run(toy: bool, console: Console, keep: Keep) -> None:
    """Raises RuntimeError where a bit is wrong, or something could not be measured."""
    sizes, device = TOY if toy else QWEN3, _device(toy)
    parts: dict[str, Callable[[], Any]] = {
        "bits": partial(check, sizes, device),
        "experts in one process": partial(alone, sizes, device),
    }
    for name, places in _places(device).items():
        parts[f"layer, {name}"] = partial(times, sizes, device, places, True)
        parts[f"way alone, {name}"] = partial(times, sizes, device, places, False)
    _measure(parts, sizes, console, keep)


def run_in_turns(toy: bool, console: Console, keep: Keep) -> None:
    """A little of it without MPS: processes take turns, for milliseconds each."""
    sizes, device = TOY if toy else replace(QWEN3, tokens=(1, 64), steps=5), _device(toy)
    parts: Parts = {
        "bits": partial(check, sizes, device),
        "way alone, 1 worker": partial(times, sizes, device, [device], False),
        "layer, 2 workers": partial(times, sizes, device, [device] * 2, True),
    }
    _measure(parts, sizes, console, keep)


def run_kill(toy: bool, console: Console, keep: Keep) -> None:
    """SIGKILL for a worker, which under MPS may take others with it."""
    sizes, device = TOY if toy else QWEN3, _device(toy)
    _measure({"kill": partial(killed, sizes, device)}, sizes, console, keep)


def _device(toy: bool) -> torch.device:
    return torch.device("cpu" if toy else "cuda:0")


def _places(device: torch.device) -> dict[str, list[torch.device]]:
    """Where workers are."""
    places = {"1 worker": [device], "2 workers": [device] * 2}
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        places["1 on each GPU"] = [device, torch.device("cuda:1")]
    return places


def _measure(parts: Parts, sizes: Sizes, console: Console, keep: Keep) -> None:
    """What fails is said, and the rest goes on, unless this process can do nothing more with its GPU."""
    found, errors = dict[str, Any](), dict[str, str]()
    keep({"sizes": asdict(sizes), "buckets": BUCKETS, "parts": found, "errors": errors})
    for name, part in parts.items():
        try:
            found[name] = part()
        except torch.AcceleratorError:
            raise
        except (ConsiliumError, RuntimeError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
        console.log(f"{name}: {found.get(name, errors.get(name))}")
        keep({"parts": found, "errors": errors})
    console.print(_table(found, sizes.tokens))
    if errors:
        raise RuntimeError(f"wrong, or not measured: {errors}")


# -- what is measured --------------------------------------------------------------------------------------------------


def check(sizes: Sizes, device: torch.device) -> str:
    """The last layer's outputs have the bits of the same kernels in this process. Raises RuntimeError."""
    kernels = kernels_of(sizes, device, range(sizes.experts))
    with opened(sizes, device, [device] * 2, True) as bench:
        for tokens in sizes.tokens:
            bench.prepare(tokens)
            outputs = bench.hop.arena.outputs[: tokens * sizes.top_k]
            outputs.fill_(float("nan"))
            failed = bench.step(tokens)
            if failed:
                raise RuntimeError(f"the step failed: {failed}")
            ids, rows, scales = (each[-1] for each in bench.inputs[tokens])
            expected = torch.empty_like(outputs)
            kernels.launch(sizes.layers - 1, rows, scales, ids.reshape(-1), expected)
            if not torch.equal(outputs.view(torch.int16), expected.view(torch.int16)):
                raise RuntimeError(f"outputs of {tokens} tokens have other bits than in one process")
    return "equal"


def alone(sizes: Sizes, device: torch.device) -> dict[int, float]:
    """Seconds of a layer's experts in this process, without any flags, by tokens: as DeviceHop's steps, a graph."""
    kernels = kernels_of(sizes, device, range(sizes.experts))
    found = {}
    for tokens in sizes.tokens:
        ids = torch.rand(tokens, sizes.experts, device=device).topk(sizes.top_k).indices.int().reshape(-1)
        rows = torch.randint(-127, 128, (tokens, sizes.hidden), dtype=torch.int8, device=device)
        scales = torch.full((tokens,), 1 / 73, device=device)
        out = torch.empty(tokens * sizes.top_k, sizes.hidden, dtype=torch.bfloat16, device=device)

        def layers(given: tuple[Tensor, Tensor, Tensor, Tensor] = (rows, scales, ids, out)) -> None:
            for layer in range(sizes.layers):
                kernels.launch(layer, *given)

        found[tokens] = statistics.median(_repeated(layers, sizes, device)) / sizes.layers
    return found


def _repeated(layers: Callable[[], None], sizes: Sizes, device: torch.device) -> list[float]:
    layers()
    run = layers
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers()
        run = graph.replay
    found = []
    for _ in range(sizes.steps):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def times(sizes: Sizes, device: torch.device, workers: Sequence[torch.device], computing: bool) -> dict[int, Any]:
    """Seconds of a layer, its inputs copied into the arena included, by tokens."""
    found = {}
    with opened(sizes, device, workers, computing) as bench:
        for tokens in sizes.tokens:
            bench.prepare(tokens)
            bench.step(tokens)
            taken = sorted(bench.seconds(tokens))
            found[tokens] = {"p50": statistics.median(taken), "p95": taken[int(0.95 * len(taken))]}
    return found


def killed(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """SIGKILL for one of two workers in the middle of a step: until that is known, and what then still works."""
    with opened(sizes, device, [device] * 2, True) as bench:
        tokens = max(sizes.tokens)
        bench.prepare(tokens)
        bench.step(tokens)
        started = time.perf_counter()
        failed = bench.step(tokens, meanwhile=bench.peers[0].process.kill)
        seconds, alive = time.perf_counter() - started, bench.peers[1].process.is_alive()
        if not failed:  # it was through before the signal came
            failed = bench.step(tokens)
        still = float(torch.ones(1000, device=device).sum()) == 1000.0  # this process's own context works
    with opened(sizes, device, [device], True) as again:
        again.prepare(tokens)
        works = not again.step(tokens)
    return {"seconds": seconds, "lost": sorted(failed), "other_alive": alive, "device_works": still, "goes_on": works}


def _table(found: Mapping[str, Any], tokens: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="µs of a layer, p50 (p95)", title_justify="left")
    for heading in ("what", *(f"{each} tokens" for each in tokens)):
        table.add_column(heading, justify="right" if "tokens" in heading else "left", no_wrap=True)
    for name, figures in found.items():
        if isinstance(figures, dict) and tokens[0] in figures:
            table.add_row(name, *(_us(figures.get(each)) for each in tokens))
    return table


def _us(seconds: float | dict[str, float] | None) -> str:
    if seconds is None:
        return "-"
    if isinstance(seconds, dict):
        return f"{seconds['p50'] * 1e6:.0f} ({seconds['p95'] * 1e6:.0f})"
    return f"{seconds * 1e6:.0f}"
