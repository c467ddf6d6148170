"""Sends the rows of a layer to the workers that hold their experts, one frame per worker, and collects the answers.

Letters: T tokens of the step, D hidden size, K experts per token, P pairs of one frame.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable, InvalidRequest, WireError
from consilium.frames import Frame
from consilium.kernels.routing import select
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.expert_meter import ExpertMeter
from gateway.fleet import Fleet
from gateway.mailbox import Completion
from gateway.messages import EXPERT_CALL_ROWS, WorkerStats
from gateway.pieces import PIECE_BYTES, in_turn, split
from gateway.placement import Placement, assign, assign_owned
from gateway.stage_clock import StageClock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer to one frame, with what it took."""

    # The rows [P, D] for P, D and their dtype; raises WireError when they are not that.
    rows: Callable[[int, int, torch.dtype], Tensor]
    queue_us: int
    compute_us: int
    round_trip: float  # seconds
    bytes_sent: int
    bytes_received: int
    release: Callable[[], None] = lambda: None  # of the memory that the rows lie in


class Worker(Protocol):
    """A connected worker, whatever the transport."""

    group: str
    address: str

    @property
    def local_link(self) -> bool:
        """Whether it is on this host, reached without gRPC."""
        ...

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        """Start one call that is given up at ``deadline`` (monotonic clock); a failure is set as its outcome."""
        ...

    def time_limit(self, pairs: int) -> float:
        """Seconds that one attempt with so many pairs may take."""
        ...


class ExpertSource(Protocol):
    """Where the outputs of experts come from."""

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """The output rows of ``batches.slots``, until they are released, and why rows (by index) have none."""
        ...


class Dispatcher:
    """Knows the current placement, and who did how much work."""

    def __init__(self, row_dtype: torch.dtype, layer_timeout: float, meter: ExpertMeter) -> None:
        self.clock = StageClock()
        self.placement = Placement()
        self.workers: Mapping[str, Worker] = {}
        self._fleet = Fleet()
        self._row_dtype, self._layer_timeout = row_dtype, layer_timeout
        self.meter = meter
        self._work: dict[str, _Work] = {}
        self._turn = 0

    def follow(self, placement: Placement, workers: Mapping[str, Worker]) -> None:
        """Send frames to these workers from now on."""
        self.placement, self.workers = placement, workers
        self._fleet.arrange(placement.addresses)

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        """The output rows of ``batches.slots``, until they are released, and why rows (by index) have none.

        A frame whose worker fails is sent again to other holders of its experts; what nobody answers for by the
        layer's deadline is missing for the rows that need it, and for no others.
        """
        self.meter.add(layer, batches)
        outputs = ExpertOutputs(batches.places, batches.rows.shape[1], self._row_dtype)
        failures: dict[int, Exception] = {}
        excluded: dict[str, ConsiliumError] = {}
        deadline = time.monotonic() + self._layer_timeout
        waits = _Waits()
        wanted: list[int] | None = None if len(batches.experts) else []  # None is all
        while wanted is None or wanted:
            plan, orphans = self._plan(layer, batches, wanted, excluded)
            for position in orphans:
                error = _unavailable(layer, int(batches.experts[position]), excluded)
                self._fail(batches, position, error, failures, outputs)
            calls = []
            sent = Counter[str]()  # pairs
            for address, positions in self._pieces(plan, batches):
                frame, pairs = build_frame(layer, batches, positions)
                worker = self.workers[address]
                sent[address] += len(pairs)
                limit = min(deadline, time.monotonic() + worker.time_limit(sent[address]))
                calls.append((worker, positions, pairs, worker.send(frame, limit)))
                self._of(worker).failovers += bool(excluded)
            self.clock.mark("encode")
            wanted = []
            for worker, positions, pairs, call in calls:
                try:
                    await self._collect(worker, call, outputs, batches.slots[pairs], waits)
                    self._of(worker).expert_calls.append(batches.counts[positions])
                except ConsiliumError as error:
                    self._of(worker).failures += 1
                    if isinstance(error, InvalidRequest):  # of this gateway, not of its client
                        error = ConsiliumError(f"a worker refused a frame of this gateway: {error.message}")
                    if error.retryable:
                        excluded[worker.address] = error
                        wanted += positions.tolist()
                    else:
                        for position in positions:
                            self._fail(batches, position, error, failures, outputs)
        self.clock.waited(waits.seconds, waits.queue_us / 1e6, waits.compute_us / 1e6)
        return outputs, failures

    @property
    def same_host(self) -> bool:
        """Whether every worker is on this host, and computes on the same cores as the gateway."""
        return all(worker.local_link for worker in self.workers.values())

    def take_stats(self) -> list[WorkerStats]:
        """What each worker did since the last call."""
        work, self._work = self._work, {}
        return [each.stats(address) for address, each in work.items()]

    def _plan(
        self, layer: int, batches: ExpertBatches, wanted: list[int] | None, excluded: Mapping[str, object]
    ) -> tuple[dict[str, NDArray[np.int64]], list[int]]:
        """Positions (in ``batches.experts``) for each address, and those without a holder; None wants all."""
        holders = self.placement.of_layer(layer)
        plan = assign_owned(holders, batches.experts) if wanted is None and not holders.replicated else None
        if plan is not None:
            return plan, []
        self._turn += 1
        if wanted is None:
            plan, orphans = assign(holders, batches.experts, batches.counts, self._fleet, self._turn)
            return plan, orphans.tolist()
        some = np.array(wanted)
        experts, counts = batches.experts[some], batches.counts[some]
        plan, orphans = assign(holders, experts, counts, self._fleet, self._turn, excluded.keys())
        return {address: some[positions] for address, positions in plan.items()}, some[orphans].tolist()

    def _pieces(
        self, plan: Mapping[str, NDArray[np.int64]], batches: ExpertBatches
    ) -> Iterable[tuple[str, NDArray[np.int64]]]:
        """Addresses with the positions of one frame each; nothing travels over local links, so theirs stay whole."""
        most = max(1, PIECE_BYTES // (batches.rows.shape[1] * self._row_dtype.itemsize))
        if len(batches.slots) <= most:
            return plan.items()
        counts = batches.counts
        return in_turn(
            {
                address: [positions] if self.workers[address].local_link else split(positions, counts, most)
                for address, positions in plan.items()
            }
        )

    async def _collect(
        self, worker: Worker, call: Completion[Reply], outputs: ExpertOutputs, slots: NDArray[np.int64], waits: _Waits
    ) -> None:
        """The rows that ``call`` brings are those of ``slots`` [P]."""
        try:
            reply = await call
        finally:
            waits.seconds += self.clock.mark("wire")
        waits.add(reply)
        try:
            rows = reply.rows(len(slots), outputs.hidden_size, self._row_dtype)  # [P, D]
        except WireError:
            reply.release()
            raise
        outputs.place(rows, slots, reply.release)
        self._of(worker).add(reply, len(slots))
        self.clock.mark("decode")

    def _of(self, worker: Worker) -> _Work:
        work = self._work.get(worker.address)
        if work is None:
            work = self._work[worker.address] = _Work(worker.group)
        return work

    @staticmethod
    def _fail(
        batches: ExpertBatches, position: int, error: Exception, failures: dict[int, Exception], outputs: ExpertOutputs
    ) -> None:
        pairs = slice(batches.offsets[position], batches.offsets[position + 1])
        outputs.drop(batches.slots[pairs])
        for row in batches.tokens[pairs]:
            failures.setdefault(int(row), error)


@dataclass(slots=True)
class _Waits:
    """How long one layer waited for its workers, and what the one that took longest says of it."""

    seconds: float = 0.0
    queue_us: int = 0
    compute_us: int = 0

    def add(self, reply: Reply) -> None:
        if reply.queue_us + reply.compute_us > self.queue_us + self.compute_us:
            self.queue_us, self.compute_us = reply.queue_us, reply.compute_us


@dataclass(slots=True)
class _Work:
    """What one worker did, counted at every frame; a plain class, for it is on the token path."""

    group: str
    frames: int = 0
    rows: int = 0
    failures: int = 0
    failovers: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    queue_us: int = 0
    compute_us: int = 0
    wire_seconds: float = 0.0
    expert_calls: list[NDArray[np.int64]] = field(default_factory=list)  # rows of each expert in each frame

    def add(self, reply: Reply, rows: int) -> None:
        """Count one frame of so many rows."""
        queue_us, compute_us = reply.queue_us, reply.compute_us
        self.frames += 1
        self.rows += rows
        self.bytes_sent += reply.bytes_sent
        self.bytes_received += reply.bytes_received
        self.queue_us += queue_us
        self.compute_us += compute_us
        self.wire_seconds += max(0.0, reply.round_trip - (queue_us + compute_us) / 1e6)

    def stats(self, address: str) -> WorkerStats:
        """As the HTTP process takes it."""
        calls = list[int]()
        if self.expert_calls:  # of a whole step at once: each call costs more than the rows
            buckets = np.searchsorted(EXPERT_CALL_ROWS, np.concatenate(self.expert_calls))
            calls = np.bincount(buckets, minlength=len(EXPERT_CALL_ROWS) + 1).tolist()
        return WorkerStats(
            self.group,
            address,
            frames=self.frames,
            rows=self.rows,
            failures=self.failures,
            failovers=self.failovers,
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            queue_seconds=self.queue_us / 1e6,
            compute_seconds=self.compute_us / 1e6,
            wire_seconds=self.wire_seconds,
            expert_calls=calls,
        )


def build_frame(layer: int, batches: ExpertBatches, positions: NDArray[np.int64]) -> tuple[Frame, NDArray[np.int64]]:
    """The frame for the experts at ``positions``, each distinct token row once, and which pairs it covers [P]."""
    pairs, tokens, offsets, indices = select(batches.offsets, batches.tokens, positions, len(batches.rows))
    rows, scales = batches.rows, batches.scales
    if len(tokens) < len(rows):
        chosen = torch.from_numpy(tokens)
        rows, scales = rows[chosen], None if scales is None else scales[chosen]
    experts = batches.experts[positions].tolist()
    return Frame(layer, rows, scales, experts, offsets.tolist(), torch.from_numpy(indices), batches.prefill), pairs


def _unavailable(layer: int, expert: int, excluded: Mapping[str, ConsiliumError]) -> ConsiliumError:
    # Clients get no addresses; they are in the log, and on /load.
    for address, error in excluded.items():
        log.warning("expert %d of layer %d: %s: %s", expert, layer, address, error.message)
    reason = "; ".join(sorted({error.message for error in excluded.values()})) or "no worker that holds it is connected"
    message = f"expert {expert} of layer {layer} is unavailable: {reason}"
    if excluded and all(isinstance(error, DeadlineExceeded) for error in excluded.values()):
        return DeadlineExceeded(message)
    return ExpertUnavailable(message)
