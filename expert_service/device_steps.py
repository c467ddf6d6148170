"""Steps of a gateway on this machine: kernels of all layers launched at once, each waiting on the device for its rows.

One packet starts a step, and one answers it when all is done; nothing that either host does lies between two layers.
Every link has its own arena (consilium.gpu.arena), thread and stream.

Letters: T tokens of the step, K experts of a token, P pairs.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilium.errors import ConsiliumError, DeadlineExceeded, InvalidRequest, WireError
from consilium.gpu.arena import ABORTED, BUCKETS, GATEWAY_SILENT, Arena, ArenaShape
from consilium.gpu.device_memory import DeviceMemory
from consilium.gpu.flags import meet, own_pairs, spins_in
from consilium.link_packets import ArenaPacket, StepPacket
from expert_service.device_arithmetic import leave
from expert_service.layer_kernels import LayerKernels

logger = logging.getLogger(__name__)

# Whoever begins to record waits for the whole device, which spoils what another link's thread is recording.
_RECORDING = threading.Lock()

Streams = tuple[torch.cuda.Stream, torch.cuda.Stream]
FREE: list[Streams] = []  # of links that have ended

Outcome = Exception | tuple[int, int]  # what went wrong, or µs in the queue and µs from there to the end
Answer = Callable[[Outcome], object]
Task = tuple[ArenaPacket | StepPacket, Answer, float]  # and when it came


@dataclass
class _Opened:
    """An arena, and what launches its steps."""

    arena: Arena
    memory: DeviceMemory
    worker: int
    spins: int
    base: Tensor  # []
    own: Tensor  # [P] the pairs that are ours
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)


class DeviceSteps:
    """Of one link; :meth:`submit` and :meth:`close` may be called by any thread."""

    def __init__(
        self,
        kernels: LayerKernels,
        admit: Callable[[], None],
        done: Callable[[Outcome], object] = lambda _: None,
    ) -> None:
        """``admit`` raises ExpertUnavailable when this worker takes nothing new; ``done`` hears of every step."""
        self._kernels, self._device, self._admit, self._done = kernels, kernels.device, admit, done
        cuda = self._device.type == "cuda"
        streams = take_streams(self._device) if cuda else (None, None)
        self._stream: torch.cuda.Stream | None = streams[0]
        self._aside: torch.cuda.Stream | None = streams[1]
        self._apart = cuda and torch.cuda.device_count() > 1  # an arena may lie on another GPU
        self._opened: _Opened | None = None
        self._lock = threading.Lock()  # of what is opened: it must not be unmapped while it is aborted
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device-steps", daemon=True)
        self._thread.start()

    def submit(self, packet: ArenaPacket | StepPacket, answer: Answer) -> None:
        """Do what the packet asks for after what came before; another thread answers. Raises ExpertUnavailable."""
        self._admit()
        if isinstance(packet, ArenaPacket):
            self._abort()  # nobody has any more use for what runs in the one before
        self._tasks.put((packet, answer, time.monotonic()))

    def close(self, seconds: float) -> None:
        """End what runs; the memory is let go once nothing uses it."""
        self._abort()
        self._tasks.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        with torch.inference_mode(), self._streaming(self._stream):
            while (task := self._tasks.get()) is not None:
                packet, answer, received = task
                started = time.monotonic()
                try:
                    self._open(packet) if isinstance(packet, ArenaPacket) else self._step(packet)
                    outcome: Outcome = int((started - received) * 1e6), int((time.monotonic() - started) * 1e6)
                except Exception as error:  # this one fails, later ones may not
                    outcome = self._give_up(error)
                if isinstance(packet, StepPacket):
                    self._done(outcome)
                answer(outcome)
            self._let_go()
        if self._stream is not None and self._aside is not None:
            FREE.append((self._stream, self._aside))

    def _give_up(self, error: Exception) -> Exception:
        """What to answer after ``error``; others wait no longer. Where the GPU itself failed this worker leaves."""
        if not isinstance(error, ConsiliumError):
            logger.error("a step on the device failed", exc_info=error)
        try:
            if isinstance(error, torch.AcceleratorError):
                raise error
            if not isinstance(error, DeadlineExceeded):  # else ``broken`` says because of whom, and shall
                self._abort()
        except torch.AcceleratorError as failure:
            return leave(failure)
        return error

    def _open(self, packet: ArenaPacket) -> None:
        """Map it, and try every kernel: what is loaded while others wait may wait for them. Raises WireError."""
        self._let_go()
        shape, layers = ArenaShape.unpack(packet.shape), len(self._kernels.layers)
        if shape.layers != layers or packet.worker >= shape.workers:
            raise WireError(f"an arena for {shape.layers} layers and {shape.workers} workers; this model has {layers}")
        memory = DeviceMemory.open(packet.handle, shape.size, self._device)
        base, own = (torch.zeros(size, dtype=torch.int32, device=self._device) for size in ((), shape.pairs))
        spins = spins_in(packet.milliseconds / 1e3, self._device)
        opened = _Opened(Arena(shape, memory.tensor), memory, packet.worker, spins, base, own)
        self._set_aside(opened.arena)  # loads that kernel, too
        for tokens in (each for each in BUCKETS if each <= shape.tokens):
            self._record(opened, tokens)
        for tokens in larger_sizes(shape.tokens):
            self._launch(opened, tokens)
        self._synchronize()
        with self._lock:
            self._opened = opened

    def _step(self, packet: StepPacket) -> None:
        opened = self._opened
        if opened is None:
            raise InvalidRequest("there is no arena on this link")
        self._kernels.refresh()
        opened.base.fill_(packet.base)
        graph = opened.graphs.get(packet.tokens)
        if graph is None:
            self._launch(opened, min(packet.tokens, opened.arena.shape.tokens))
        else:
            graph.replay()
        self._synchronize()
        broken = int(opened.arena.broken)
        if broken:
            raise DeadlineExceeded(f"somebody was waited for in vain, or gave up: {broken:#x}")

    def _record(self, opened: _Opened, tokens: int) -> None:
        """The kernels of a step of so many tokens as one graph, where there are graphs."""
        self._launch(opened, tokens)
        if self._stream is None:
            return
        self._synchronize()
        graph = torch.cuda.CUDAGraph()
        pool = next((each.pool() for each in opened.graphs.values()), None)
        # Other threads compute, too: what they allocate meanwhile is no business of this graph.
        recording = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        with _RECORDING, recording:
            self._launch(opened, tokens)
        opened.graphs[tokens] = graph

    def _launch(self, opened: _Opened, tokens: int) -> None:
        """Of every layer: wait for its rows, compute the pairs that are ours, say so."""
        arena, me = opened.arena, opened.worker
        done, pairs = arena.done[me], tokens * arena.shape.top_k
        ids, own, out = arena.ids[:tokens], opened.own[:pairs], arena.outputs[:pairs]
        for number, layer in enumerate(self._kernels.layers):
            meet(
                opened.base,
                arena.broken,
                tell=done if number else None,
                tell_at=number,
                words=arena.request,
                count=1,
                wait_at=number + 1,
                blame=GATEWAY_SILENT,
                spins=opened.spins,
            )
            table = self._kernels.table(layer)
            own_pairs(ids, arena.owners[number], table, own, arena.broken, worker=me, blame=1 << me)
            rows, scales = arena.rows[:tokens], arena.scales[:tokens]
            if self._apart:  # each row is fetched once
                rows, scales = rows.clone(), scales.clone()
            self._kernels.launch(layer, rows, scales if rows.dtype is torch.int8 else None, own, out)
        meet(opened.base, arena.broken, tell=done, tell_at=len(self._kernels.layers))

    def _abort(self) -> None:
        """Whoever waits in the arena stops waiting, here and in the other processes."""
        with self._lock:
            if self._opened is not None:
                self._set_aside(self._opened.arena)

    def _set_aside(self, arena: Arena) -> None:
        with torch.inference_mode(), self._streaming(self._aside):  # whatever thread this is
            arena.broken.fill_(ABORTED)
            if self._aside is not None:
                self._aside.synchronize()

    def _let_go(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            self._synchronize()
            opened.graphs.clear()
            opened.memory.close()
            logger.info("a gateway's arena on the device is let go")

    def _synchronize(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    @contextmanager
    def _streaming(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(stream))
            yield


def take_streams(device: torch.device) -> Streams:
    """For a link's steps, and for what must not wait behind one: nobody else's.

    torch has 32 streams of each priority, then hands the first ones out again, and those of one priority may share one
    of the GPU's queues. Frames have the usual priority.
    """
    if FREE:
        return FREE.pop()
    steps, aside = (torch.cuda.Stream(device, priority=priority) for priority in (-1, -2))
    return steps, aside


def larger_sizes(most: int) -> Iterator[int]:
    """Tokens of steps that are not recorded, up to ``most``: doublings, so that no tiling's kernels are missed."""
    tokens = 2 * BUCKETS[-1]
    while tokens < most:
        yield tokens
        tokens *= 2
    yield most
