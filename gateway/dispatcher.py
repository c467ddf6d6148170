"""Sends the rows of a layer to the workers that hold their experts, one frame per worker, and collects the answers.

Letters: T tokens of the step, D hidden size, K experts per token, P pairs of one frame.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable, InvalidRequest
from consilium.frames import Frame, decode_result
from gateway.batches import ExpertBatches
from gateway.expert_meter import ExpertMeter
from gateway.mailbox import Completion
from gateway.messages import EXPERT_CALL_ROWS, WorkerStats
from gateway.placement import Placement, assign
from protos.expert.v1 import expert_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """A worker's answer to one frame, with what it took."""

    result: expert_pb2.Result
    round_trip: float  # seconds
    bytes_sent: int
    bytes_received: int


class Worker(Protocol):
    """A connected worker, whatever the transport."""

    group: str
    address: str

    def send(self, frame: Frame, deadline: float) -> Completion[Reply]:
        """Start one call that is given up at ``deadline`` (monotonic clock); a failure is set as its outcome."""
        ...

    def time_limit(self, pairs: int) -> float:
        """Seconds that one attempt with so many pairs may take."""
        ...


class ExpertSource(Protocol):
    """Where the outputs of experts come from."""

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[Tensor, dict[int, Exception]]:
        """Outputs [T * K, D] float32 in the places of ``batches.slots``, and why rows (by index) have none."""
        ...


class Dispatcher:
    """Knows the current placement, and who did how much work."""

    def __init__(self, row_dtype: torch.dtype, layer_timeout: float, meter: ExpertMeter) -> None:
        self.placement = Placement()
        self.workers: Mapping[str, Worker] = {}
        self._row_dtype, self._layer_timeout = row_dtype, layer_timeout
        self.meter = meter
        self._stats: dict[str, WorkerStats] = {}
        self._expert_calls: dict[str, list[NDArray[np.int64]]] = {}  # rows of each expert in each frame, by address
        self._turn = 0

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[Tensor, dict[int, Exception]]:
        """Outputs [T * K, D] float32 in the places of ``batches.slots``, and why rows (by index) have none.

        A frame whose worker fails is sent again to other holders of its experts; what nobody answers for by the
        layer's deadline is missing for the rows that need it, and for no others.
        """
        self.meter.add(layer, batches)
        hidden_size = batches.rows.shape[1]
        outputs = torch.zeros(batches.places, hidden_size)
        failures: dict[int, Exception] = {}
        excluded: dict[str, ConsiliumError] = {}
        deadline = time.monotonic() + self._layer_timeout
        wanted = list(range(len(batches.experts)))
        while wanted:
            plan, orphans = self._plan(layer, batches, wanted, excluded)
            for position in orphans:
                self._fail(batches, position, _unavailable(layer, int(batches.experts[position]), excluded), failures)
            calls = []
            for address, positions in plan.items():
                frame, pairs = build_frame(layer, batches, positions)
                worker = self.workers[address]
                limit = min(deadline, time.monotonic() + worker.time_limit(len(pairs)))
                calls.append((worker, positions, pairs, worker.send(frame, limit)))
                self._count(worker, failovers=bool(excluded))
            wanted = []
            for worker, positions, pairs, call in calls:
                try:
                    outputs[batches.slots[pairs]] = await self._collect(worker, call, len(pairs), hidden_size)
                    self._expert_calls.setdefault(worker.address, []).append(batches.counts[positions])
                except ConsiliumError as error:
                    self._count(worker, failures=1)
                    if isinstance(error, InvalidRequest):  # of this gateway, not of its client
                        error = ConsiliumError(f"a worker refused a frame of this gateway: {error.message}")
                    if error.retryable:
                        excluded[worker.address] = error
                        wanted += positions
                    else:
                        for position in positions:
                            self._fail(batches, position, error, failures)
        return outputs, failures

    def take_stats(self) -> list[WorkerStats]:
        """What each worker did since the last call."""
        for address, calls in self._expert_calls.items():  # of a whole step at once: each call costs more than the rows
            buckets = np.searchsorted(EXPERT_CALL_ROWS, np.concatenate(calls))
            self._stats[address].expert_calls = np.bincount(buckets, minlength=len(EXPERT_CALL_ROWS) + 1).tolist()
        stats, self._stats, self._expert_calls = list(self._stats.values()), {}, {}
        return stats

    def _plan(
        self, layer: int, batches: ExpertBatches, wanted: list[int], excluded: Mapping[str, object]
    ) -> tuple[dict[str, list[int]], list[int]]:
        """Positions (in ``batches.experts``) for each address, and those without a holder."""
        holders = {}
        for position in wanted:
            addresses = self.placement.holders.get((layer, int(batches.experts[position])), ())
            holders[position] = tuple(each for each in addresses if each not in excluded) if excluded else addresses
        self._turn += 1
        counts = batches.counts
        return assign({position: int(counts[position]) for position in wanted}, holders, self._turn)

    async def _collect(self, worker: Worker, call: Completion[Reply], pairs: int, hidden_size: int) -> Tensor:
        reply = await call
        rows = decode_result(reply.result, pairs, hidden_size, self._row_dtype)  # [P, D]
        queue_seconds, compute_seconds = reply.result.queue_us / 1e6, reply.result.compute_us / 1e6
        self._count(
            worker,
            frames=1,
            rows=pairs,
            bytes_sent=reply.bytes_sent,
            bytes_received=reply.bytes_received,
            queue_seconds=queue_seconds,
            compute_seconds=compute_seconds,
            wire_seconds=max(0.0, reply.round_trip - queue_seconds - compute_seconds),
        )
        return rows.float()

    def _count(self, worker: Worker, **amounts: float) -> None:
        stats = self._stats.setdefault(worker.address, WorkerStats(worker.group, worker.address))
        for name, amount in amounts.items():
            setattr(stats, name, getattr(stats, name) + amount)

    @staticmethod
    def _fail(batches: ExpertBatches, position: int, error: Exception, failures: dict[int, Exception]) -> None:
        for row in batches.tokens[batches.offsets[position] : batches.offsets[position + 1]]:
            failures.setdefault(int(row), error)


def build_frame(layer: int, batches: ExpertBatches, positions: list[int]) -> tuple[Frame, NDArray[np.int64]]:
    """The frame for the experts at ``positions``, each distinct token row once, and which pairs it covers [P]."""
    bounds = [(batches.offsets[each], batches.offsets[each + 1]) for each in positions]
    pairs = np.concatenate([np.arange(start, stop) for start, stop in bounds])
    tokens, indices = np.unique(batches.tokens[pairs], return_inverse=True)
    rows, scales = batches.rows, batches.scales
    if len(tokens) < len(rows):
        rows, scales = rows[tokens], None if scales is None else scales[tokens]
    frame = Frame(
        layer=layer,
        rows=rows,
        scales=scales,
        experts=batches.experts[positions].tolist(),
        offsets=np.cumsum([0, *(stop - start for start, stop in bounds)]).tolist(),
        indices=torch.from_numpy(indices.astype(np.int32)),
    )
    return frame, pairs


def _unavailable(layer: int, expert: int, excluded: Mapping[str, ConsiliumError]) -> ConsiliumError:
    # Clients get no addresses; they are in the log, and on /load.
    for address, error in excluded.items():
        log.warning("expert %d of layer %d: %s: %s", expert, layer, address, error.message)
    reason = "; ".join(sorted({error.message for error in excluded.values()})) or "no worker that holds it is connected"
    message = f"expert {expert} of layer {layer} is unavailable: {reason}"
    if excluded and all(isinstance(error, DeadlineExceeded) for error in excluded.values()):
        return DeadlineExceeded(message)
    return ExpertUnavailable(message)
