"""Experts that are computed on a device, for calls whose rows come from the host and go back there."""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from consilium.checkpoint import ExpertTensors
from consilium.errors import NotReady, Overloaded
from consilium.experts import Arithmetic, ExpertWeights
from consilium.gpu.experts import ExpertForm
from consilium.gpu.tiling import Tilings
from expert_service.lane import Lane, Work

logger = logging.getLogger(__name__)

LANES = 3  # batches on their way at a time: one comes, one is computed, one goes
PIECE = 2048  # pairs of a batch; larger calls are cut, so that their copies overlap


class DeviceArithmetic:
    """As the arithmetic of the host, whose weights it is given after they were uploaded (Uploader)."""

    def __init__(
        self, host: Arithmetic, form: ExpertForm, tilings: Tilings, device: torch.device, numerics_class: str
    ) -> None:
        self.row_dtype, self.reply_dtype, self.numerics_class = host.row_dtype, host.reply_dtype, numerics_class
        self.device_seconds = 0.0  # that the device was busy with calls, copies included
        self._host = host
        self._free = deque(Lane(form, tilings, device) for _ in range(LANES))

    def prepare(self, tensors: ExpertTensors) -> ExpertWeights:
        """On the host: what is hashed, sent to peers, and uploaded."""
        return self._host.prepare(tensors)

    def compute(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Raises Overloaded where the device has not even memory for one row, NotReady where it failed."""
        found = out if out is not None else torch.empty(offsets[-1], rows.shape[1], dtype=self.reply_dtype)
        pieces = deque(
            Work(experts, offsets, rows, scales, indices, part, start, start + len(part))
            for start, part in zip(range(0, len(found), PIECE), found.split(PIECE), strict=True)
        )
        busy: deque[Lane] = deque()
        try:
            while pieces:
                if not self._free:
                    self._finish(busy)
                self._begin(pieces, busy)
        finally:
            while busy:
                self._finish(busy)
        return found

    def begin(
        self,
        experts: Sequence[ExpertWeights],
        offsets: Sequence[int],
        rows: Tensor,
        scales: Tensor | None,
        out: Tensor,
        indices: Tensor | None,
    ) -> Callable[[], None]:
        """As ``compute``, but ``out`` is filled when what is returned was called, in the order of begins.

        A call of one piece goes on by itself where that leaves a lane for others; everything else is computed at once.
        """
        if len(out) > PIECE or len(self._free) == 1:
            self.compute(experts, offsets, rows, scales, out, indices)
            return lambda: None
        pieces, busy = deque([Work(experts, offsets, rows, scales, indices, out, 0, len(out))]), deque[Lane]()
        self._begin(pieces, busy)
        if pieces:  # there was no memory
            self.compute(experts, offsets, rows, scales, out, indices)
            return lambda: None
        return partial(self._finish, busy)

    def _begin(self, pieces: deque[Work], busy: deque[Lane]) -> None:
        """Set the next piece going, or make it smaller where it finds no memory."""
        lane, work = self._free[0], pieces[0]
        try:
            lane.begin(work)
        except torch.OutOfMemoryError:
            self._make_room(pieces, busy)
            return
        except torch.AcceleratorError as error:
            raise leave(error) from error
        pieces.popleft()
        busy.append(self._free.popleft())

    def _make_room(self, pieces: deque[Work], busy: deque[Lane]) -> None:
        if busy:  # what they give back may be enough
            while busy:
                self._finish(busy)
            return
        torch.cuda.empty_cache()
        work = pieces.popleft()
        if work.end - work.start == 1:
            raise Overloaded("the device is out of memory; try again a little later, or lower worker.memory")
        logger.warning("the device is out of memory: a batch of %d rows is halved", work.end - work.start)
        pieces.extendleft(reversed(work.halves()))

    def _finish(self, busy: deque[Lane]) -> None:
        lane = busy.popleft()
        self._free.append(lane)
        try:
            self.device_seconds += lane.finish()
        except torch.AcceleratorError as error:
            raise leave(error) from error


def leave(error: Exception) -> NotReady:
    """After such an error a process can do nothing with its GPU any more: have this one drain and end."""
    logger.critical("the GPU failed, and this worker leaves: %s", error)
    os.kill(os.getpid(), signal.SIGTERM)
    return NotReady("the GPU of this worker failed, and it is leaving; ask another one")
