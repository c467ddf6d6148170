"""What has become of each row of one layer: it is there, has failed, or is done without, as the deployment chose.

Letters: D hidden size, P pairs of one frame.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from consilium.errors import ConsiliumError, DeadlineExceeded, ExpertUnavailable
from consilium.kernels.float_tile import BFLOAT16, FLOAT32
from consilium.kernels.routing import all_finite
from gateway.attempt import Attempt
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.crew import Crew
from gateway.framing import build_frame
from gateway.worker import Reply

log = logging.getLogger(__name__)


class LayerRows:
    """Positions are those in ``batches.experts``."""

    __slots__ = ("_batches", "_crew", "_form", "_layer", "_outputs", "failures", "placed")

    def __init__(self, crew: Crew, layer: int, batches: ExpertBatches, outputs: ExpertOutputs) -> None:
        self.failures: dict[int, Exception] = {}  # why rows (by index) have no outputs
        self.placed: set[int] | None = None  # positions, from when some are asked for twice
        self._crew, self._layer, self._batches, self._outputs = crew, layer, batches, outputs
        self._form = FLOAT32 if outputs.dtype is torch.float32 else BFLOAT16

    def of(self, reply: Reply, pairs: int) -> Tensor:
        """The rows [P, D] of a reply. Raises WireError when they are not what was asked for."""
        return reply.rows(pairs, self._outputs.hidden_size, self._outputs.dtype)

    def finite(self, rows: Tensor) -> bool:
        """Whether all of them are numbers."""
        rows = rows.contiguous()
        return bool(all_finite(self._form, rows.data_ptr(), rows.numel()))

    def place(self, attempt: Attempt, rows: Tensor, release: Callable[[], None]) -> None:
        """These are what ``attempt`` asked for; ``release`` is called when nobody needs them any more."""
        self._outputs.place(rows, self._batches.slots[attempt.pairs], release)
        self._crew.work.of(attempt.worker).expert_calls.append(self._batches.counts[attempt.positions])
        if self.placed is not None:
            self.placed.update(attempt.positions.tolist())

    def fail(self, positions: Sequence[int], error_of: Callable[[int], Exception]) -> None:
        """The rows that need these have no outputs; ``error_of`` says why, for an expert."""
        batches = self._batches
        for position in positions:
            error = error_of(int(batches.experts[position]))
            pairs = slice(batches.offsets[position], batches.offsets[position + 1])
            self._outputs.drop(batches.slots[pairs])
            for row in batches.tokens[pairs]:
                self.failures.setdefault(int(row), error)

    def unavailable(self, positions: Sequence[int], errors: Mapping[str, ConsiliumError]) -> None:
        """The same, because nobody computes them; ``errors`` has what each worker said last."""
        self.fail(positions, lambda expert: unavailable(self._layer, expert, errors))

    def orphaned(self, positions: list[int], errors: Mapping[str, ConsiliumError]) -> list[int]:
        """Nobody can take these: what happens is the deployment's choice. Those that are to be waited for."""
        policy = self._crew.config.last_replica
        if policy == "fail":
            self.unavailable(positions, errors)
            return []
        if policy == "local":
            positions = self._compute(positions, errors)
        elif policy == "renormalise":
            for position in positions:
                self._outputs.leave_out(self._batches.slots[self._pairs(position)])
        for position in positions:
            self._outputs.stood_in.update(self._batches.tokens[self._pairs(position)].tolist())
        return positions if policy == "wait" else []

    def account(self) -> None:
        """Fail what nothing has become of. There is none unless the dispatcher is wrong; then zeros would be used."""
        slots, addresses = self._batches.slots, self._outputs.addresses
        if np.count_nonzero(addresses) == len(slots):  # only these have ever been placed
            return
        left_out = self._outputs.left_out
        there = (addresses[slots] != 0) | np.isin(slots, () if left_out is None else left_out)
        rows = {int(row) for row in self._batches.tokens[~there]} - self.failures.keys()
        for row in rows:
            self.failures[row] = ConsiliumError("an expert's output is missing; see the gateway's log")
        if rows:
            log.error("layer %d: outputs of %d rows are neither there nor failed: a bug", self._layer, len(rows))

    def _pairs(self, position: int) -> slice:
        return slice(self._batches.offsets[position], self._batches.offsets[position + 1])

    def _compute(self, positions: list[int], errors: Mapping[str, ConsiliumError]) -> list[int]:
        """Compute these here, from the checkpoint; those that could be had."""
        frame, pairs = build_frame(self._layer, self._batches, np.array(positions, np.int64))
        try:
            rows = self._crew.local().rows(frame)
        except ConsiliumError as error:
            log.error("experts %s of layer %d cannot be computed here: %s", frame.experts, self._layer, error.message)
            self.unavailable(positions, errors)
            return []
        self._outputs.place(rows, self._batches.slots[pairs])
        return positions


def unavailable(layer: int, expert: int, errors: Mapping[str, ConsiliumError]) -> ConsiliumError:
    """Why nobody computes this expert. Clients get no addresses; they are in the log, and on /load."""
    for address, error in errors.items():
        log.warning("expert %d of layer %d: %s: %s", expert, layer, address, error.message)
    reason = "; ".join(sorted({error.message for error in errors.values()})) or "no worker that holds it is connected"
    message = f"expert {expert} of layer {layer} is unavailable: {reason}"
    if errors and all(isinstance(error, DeadlineExceeded) for error in errors.values()):
        return DeadlineExceeded(message)
    return ExpertUnavailable(message)
