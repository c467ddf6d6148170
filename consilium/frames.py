"""A frame: the rows of one step that one layer sends to one worker, and the rows that come back.

Letters: U distinct token rows, P (token, expert) pairs, M experts asked for, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from consilium.errors import WireError
from consilium.kernels.routing import in_order
from consilium.wire import Memory, Place, decode_tensor, encode_tensor
from protos.expert.v1 import expert_pb2

PROTOCOL_VERSION = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """Distinct token rows, and for each expert asked for which of them it computes."""

    layer: int
    rows: Tensor  # [U, D] int8 with scales, or the model's row dtype
    scales: Tensor | None  # [U] float32, only with int8 rows
    experts: list[int]  # [M] ascending
    offsets: list[int]  # [M + 1] where the indices of each expert begin
    indices: Tensor  # [P] int32 into rows
    prefill: bool = False  # some of the rows are of prompts: whoever waits for single tokens goes first


def encode_call(
    frame: Frame,
    call_id: int,
    deadline_ms: int = 0,
    place: Place | None = None,
) -> expert_pb2.Call:
    """The message for ``frame``; ``deadline_ms`` counts from receipt, 0 is none. Tensors go where ``place`` says."""
    return expert_pb2.Call(
        call_id=call_id,
        layer=frame.layer,
        rows=encode_tensor(frame.rows, place),
        scales=None if frame.scales is None else encode_tensor(frame.scales, place),
        experts=frame.experts,
        offsets=frame.offsets,
        indices=encode_tensor(frame.indices, place),
        deadline_ms=deadline_ms,
        traffic_class=expert_pb2.TRAFFIC_CLASS_PREFILL if frame.prefill else expert_pb2.TRAFFIC_CLASS_DECODE,
    )


def decode_call(call: expert_pb2.Call, hidden_size: int, row_dtype: torch.dtype, memory: Memory | None = None) -> Frame:
    """The frame in ``call``, with every size, offset and index checked; tensors may lie in ``memory``.

    ``row_dtype`` is what this worker computes from: torch.int8 (then scales must be there) or its float dtype.
    Raises WireError that names the field.
    """
    rows = decode_tensor(call.rows, "rows", row_dtype, (None, hidden_size), memory)
    scales = None
    if row_dtype is torch.int8:
        scales = decode_tensor(call.scales, "scales", torch.float32, (rows.shape[0],), memory)
    elif call.HasField("scales"):
        raise WireError(f"scales: not expected with {row_dtype} rows")
    indices = decode_tensor(call.indices, "indices", torch.int32, (None,), memory)
    prefill = call.traffic_class == expert_pb2.TRAFFIC_CLASS_PREFILL
    frame = Frame(call.layer, rows, scales, list(call.experts), list(call.offsets), indices, prefill)
    check_order(frame)
    return frame


def check_order(frame: Frame) -> None:
    """Raises WireError that says what is wrong with experts, offsets or indices."""
    experts, offsets, indices, rows = frame.experts, frame.offsets, frame.indices, frame.rows
    if in_order(np.array(experts, np.int64), np.array(offsets, np.int64), indices.numpy(), len(rows)):
        return
    if any(a >= b for a, b in pairwise(experts)):
        raise WireError(f"experts: must be ascending and distinct, found {experts[:16]}")
    if len(offsets) != len(experts) + 1 or offsets[0] != 0 or offsets[-1] != indices.numel():
        raise WireError(
            f"offsets: expected {len(experts) + 1} entries from 0 to {indices.numel()}, found {offsets[:16]}"
        )
    if any(a > b for a, b in pairwise(offsets)):
        raise WireError(f"offsets: must not fall, found {offsets[:16]}")
    if any(b - a > rows.shape[0] for a, b in pairwise(offsets)):
        raise WireError(f"offsets: an expert computes a row once, found {offsets[:16]} over {rows.shape[0]} rows")
    low, high = (int(each) for each in indices.aminmax())
    raise WireError(f"indices: must lie in 0..{rows.shape[0] - 1}, found {low}..{high}")


def decode_result(
    result: expert_pb2.Result, pairs: int, hidden_size: int, dtype: torch.dtype, memory: Memory | None = None
) -> Tensor:
    """The output rows [P, D] of a call of ``pairs`` pairs. Raises WireError when they are not what was asked for."""
    return decode_tensor(result.rows, "result rows", dtype, (pairs, hidden_size), memory)


def encode_result(rows: Tensor, queue_us: int, compute_us: int, place: Place | None = None) -> expert_pb2.Result:
    """The message for output rows [P, D], which go where ``place`` says."""
    return expert_pb2.Result(rows=encode_tensor(rows, place), queue_us=queue_us, compute_us=compute_us)
