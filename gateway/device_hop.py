"""Experts of other processes on this machine's GPUs, without any host between layers: an arena, and steps through it.

The engine's thread sends every worker one packet a step, and launches its own kernels; in each layer they say that the
rows are there, and wait until every worker has said that its outputs are (consilium.gpu.flags). Whoever is waited for
in vain breaks the arena: nothing waits in it any more, the step's results are thrown away, and it is computed again
some other way. Positions are written again with the same numbers, so no bit depends on that.

Letters: L layers with experts, E experts in a layer, W workers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from consilium.errors import DeadlineExceeded, WireError
from consilium.gpu.arena import ABORTED, BUCKETS, Arena, ArenaShape
from consilium.gpu.device_memory import DeviceMemory
from consilium.gpu.flags import meet, spins_in
from consilium.link_packets import ArenaPacket, StepPacket
from gateway.local_link import Times
from gateway.mailbox import Completion
from gateway.placement import Placement

OPENING_SECONDS = 120.0  # for workers to compile and record their kernels
ANSWER_SECONDS = 60.0  # for what the device has said already
# Workers wait this many times as long as the gateway: else one that waits for the gateway, because the gateway waits
# for another one, would be the first to give up, and nobody would know because of whom.
PATIENT = 4


class Member(Protocol):
    """A worker that takes part (WorkerConnection)."""

    address: str
    on_end: Callable[[], None]  # called by another thread when it is gone

    def ask(self, packet: Callable[[int], bytes], deadline: float) -> Completion[Times]: ...


class DeviceHop:
    """One arena from opening to breaking; only the engine's thread uses it, but for :meth:`abort`."""

    def __init__(self, shape: ArenaShape, members: Sequence[Member], device: torch.device, seconds: float) -> None:
        """``seconds`` is how long a worker is waited for within a layer. Raises WireError."""
        self.members, self.lost = list(members), dict[str, Exception]()
        self.expires = math.inf  # when whoever has not answered until then is not ready
        self.steps = 0  # that were begun
        self._device, self._layers = device, shape.layers
        self._memory = DeviceMemory.allocate(shape.size, device)
        with torch.inference_mode():  # here and below: steps are computed in it, and other threads are not
            self.arena = Arena(shape, self._memory.tensor)
            self.arena.prepare()
            self._base = torch.zeros((), dtype=torch.int32, device=device)
        self._spins, self._milliseconds = spins_in(seconds, device), int(PATIENT * seconds * 1e3)
        # Streams of one priority may share one of the GPU's queues, and then wait for each other.
        self._aside = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.abort()  # loads that kernel: it may be needed while another one waits
        self.exchange(0)

    def open(self, on_outcome: Callable[[str, Exception | None], None]) -> None:
        """Ask every worker to map it; ``on_outcome`` hears of each, by address."""
        handle, shape = self._memory.handle, self.arena.shape.pack()

        self.expires = time.monotonic() + OPENING_SECONDS

        def told(address: str, outcome: Times | Exception) -> None:
            on_outcome(address, outcome if isinstance(outcome, Exception) else None)

        for number, each in enumerate(self.members):
            each.on_end = self.abort  # the engine's thread may be waiting for the device by then

            def packet(call_id: int, number: int = number) -> bytes:
                return ArenaPacket(number, self._milliseconds, call_id, handle, shape).pack()

            each.ask(packet, self.expires).hand_over(partial(told, each.address))

    def start(self) -> None:
        """Every worker is ready."""
        with torch.inference_mode():
            self.arena.begin()
        self._synchronize()

    def place(self, owners: NDArray[np.int32]) -> None:
        """From the next step on expert [L, E] is computed by the member of this number."""
        with torch.inference_mode():
            self.arena.owners.copy_(torch.from_numpy(owners))

    def begin(self, tokens: int) -> None:
        """A step of so many rows (a bucket's, where possible; rows without tokens have ids of -1) is to follow."""
        base = _wrapped(self.steps * self._layers)
        with torch.inference_mode():
            self._base.fill_(base)
        self.steps += 1

        def packet(call_id: int) -> bytes:
            return StepPacket(tokens, base, call_id).pack()

        for each in self.members:
            each.ask(packet, time.monotonic() + ANSWER_SECONDS).hand_over(partial(self._answered, each.address))

    def exchange(self, number: int) -> None:
        """Launch, for the layer of this number: the arena's rows are there; wait for the outputs of all workers."""
        arena = self.arena
        meet(
            self._base,
            arena.broken,
            tell=arena.request,
            tell_at=number + 1,
            words=arena.done[0],
            count=len(self.members),
            wait_at=number + 1,
            blame=1,
            spins=self._spins,
        )

    def failed(self, broken: int) -> dict[str, Exception]:
        """Why the step that has ended is of no use, by address, from the word ``arena.broken``; empty: it is good."""
        for number, each in enumerate(self.members):
            if broken >> number & 1:
                self.lost.setdefault(
                    each.address, WireError("it did not signal in time on the device, or lacks an expert")
                )
        if broken and not self.lost:
            self.lost[""] = WireError(f"the arena was given up: {broken:#x}")
        return self.lost

    def abort(self) -> None:
        """Nothing waits in the arena any more; any thread may say so, while the engine's waits for the device."""
        with torch.inference_mode(), self._beside():
            self.arena.broken.fill_(ABORTED)

    def close(self) -> None:
        """Free the memory, once no worker has it any more."""
        self._synchronize()
        self._memory.close()

    def _answered(self, address: str, outcome: Times | Exception) -> None:
        if isinstance(outcome, DeadlineExceeded):  # somebody else was waited for in vain: ``broken`` says who
            return
        if isinstance(outcome, Exception):
            self.lost.setdefault(address, outcome)
            self.abort()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._aside is not None:
                stack.enter_context(torch.cuda.device(self._device))
                stack.enter_context(torch.cuda.stream(self._aside))
            yield


def bucket_of(tokens: int) -> int:
    """The rows of a step of so many tokens: few are filled up, so that a recorded graph fits."""
    return next((each for each in BUCKETS if each >= tokens), tokens)


def owners_of(
    placement: Placement, members: Sequence[str], layers: Sequence[int], experts: int
) -> NDArray[np.int32] | None:
    """Which member computes each expert [L, E], evenly within a layer; None where one has no holder among them."""
    owners = np.full((len(layers), experts), -1, np.int32)
    number = {address: place for place, address in enumerate(members)}
    for row, layer in enumerate(layers):
        held = [
            [number[each] for each in placement.holders.get((layer, expert), ()) if each in number]
            for expert in range(experts)
        ]
        load = [0] * len(members)
        for expert in sorted(range(experts), key=lambda each: len(held[each])):  # those without a choice first
            if not held[expert]:
                return None
            owner = min(held[expert], key=lambda each: (load[each], each))
            owners[row, expert] = owner
            load[owner] += 1
    return owners


def _wrapped(number: int) -> int:
    """As an int32 that has wrapped around."""
    return (number + 2**31) % 2**32 - 2**31
