"""One call, from its message to the message of its result.

Letters: U distinct token rows, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from consilium.errors import StalePlacement, TooLarge
from consilium.experts import Arithmetic, ExpertWeights
from consilium.frames import Frame, decode_call, encode_result
from consilium.units import format_size
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2

INDEX_BYTES = torch.int32.itemsize


class FrameComputer:
    """Decodes calls, computes them in batches of at most ``max_batch`` pairs, and encodes the results."""

    def __init__(
        self, store: ExpertStore, arithmetic: Arithmetic, hidden_size: int, max_batch: int, max_frame: int
    ) -> None:
        self._store, self._arithmetic = store, arithmetic
        self._hidden_size, self._max_batch, self._max_frame = hidden_size, max_batch, max_frame

    def result_bytes(self, call: expert_pb2.Call) -> int:
        """Size of the rows of the call's result. Raises TooLarge when they or the call pass the largest frame."""
        pairs = len(call.indices.data) // INDEX_BYTES
        size = pairs * self._hidden_size * self._arithmetic.reply_dtype.itemsize
        for what, found in (("call", call.ByteSize()), (f"result of {pairs} rows", size)):
            if found > self._max_frame:
                raise TooLarge(
                    f"the {what} takes {found} bytes, more than this worker's largest frame of "
                    f"{format_size(self._max_frame)}; send fewer rows, or raise worker.max_frame"
                )
        return size

    def compute(self, call: expert_pb2.Call, received: float, check: Callable[[], None]) -> expert_pb2.Result:
        """The result of ``call``, which came at the monotonic time ``received``.

        ``check`` is called before each batch and ends the work by raising. Raises WireError, StalePlacement.
        """
        started = time.monotonic()
        frame = decode_call(call, self._hidden_size, self._arithmetic.row_dtype)
        if call.weight_version:
            raise StalePlacement(f"this worker has no weight version {call.weight_version!r}; leave the field empty")
        experts = self._store.find(frame.layer, frame.experts)
        pairs = frame.indices.numel()
        rows = torch.empty(pairs, self._hidden_size, dtype=self._arithmetic.reply_dtype)  # [P, D]
        for start in range(0, pairs, self._max_batch):
            check()
            end = min(start + self._max_batch, pairs)
            rows[start:end] = self._compute_batch(frame, experts, start, end)
        return encode_result(rows, started - received, time.monotonic() - started)

    def _compute_batch(self, frame: Frame, experts: list[ExpertWeights], start: int, end: int) -> Tensor:
        """Output rows of the pairs ``start`` to ``end``."""
        offsets = [min(max(offset, start), end) - start for offset in frame.offsets]
        indices = frame.indices[start:end]
        rows = frame.rows.index_select(0, indices)
        scales = None if frame.scales is None else frame.scales.index_select(0, indices)
        return self._arithmetic.compute(experts, offsets, rows, scales)
