"""Times one worker over the stream that gateways use, with calls that it answers like any other.

Letters: D hidden size.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import grpc
import torch

from consilium.doctor.verdict import FEW, MANY, Timing
from consilium.errors import WireError
from consilium.frames import Frame, encode_call
from consilium.rpc import channel_options, from_call_error, from_rpc_error
from consilium.wire import TORCH_DTYPES
from protos.expert.v1 import expert_pb2, expert_pb2_grpc

CALL_SECONDS = 30.0
PROBE_SECONDS = 120.0  # that all the calls to one worker may take
WARMUP = 5
LARGE_BYTES = 4 * 2**20  # of the call that measures the bandwidth
LARGE_CALLS = 10
EXPERT_CALLS = 20  # of each size, each to another expert, so that its weights are in no cache
NO_VERSION = "consilium doctor"  # the large call asks for weights of this version, and is refused before any computing


def describe(address: str) -> expert_pb2.DescribeResponse:
    """What the worker says of itself. Raises ConsiliumError when it cannot be asked."""
    with grpc.insecure_channel(address, options=channel_options()) as channel:
        try:
            return expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest(), timeout=5.0)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def probe(address: str, worker: expert_pb2.DescribeResponse, calls: int) -> Timing:
    """Medians of ``calls`` empty calls, of large ones, and of calls of one expert. Raises ConsiliumError."""
    places = [(layer.layer, expert) for layer in worker.layers for expert in layer.experts]
    if not places:
        raise WireError("it holds no expert")
    with _stream(address) as stream:
        frame = _frame(worker, places[0][0], [], 0)
        empty = median([stream.ask(frame)[0] for _ in range(WARMUP + calls)][WARMUP:])
        row_bytes = worker.hidden_size * _row_dtype(worker).itemsize
        large = _frame(worker, places[0][0], [], -(-LARGE_BYTES // row_bytes))
        size = large.rows.nbytes
        longer = median([stream.ask(large, NO_VERSION)[0] for _ in range(1 + LARGE_CALLS)][1:])
        few, many = (
            median([stream.ask(_frame(worker, layer, [expert], rows))[1] for layer, expert in _spread(places)])
            for rows in (FEW, MANY)
        )
    return Timing(empty, max(0.0, longer - empty) / size, few, many)


def _spread(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Some of the experts, from all the layers; the same ones again where there are few."""
    step = max(1, len(places) // EXPERT_CALLS)
    return list(itertools.islice(itertools.cycle(places[::step]), EXPERT_CALLS))


def _frame(worker: expert_pb2.DescribeResponse, layer: int, experts: list[int], rows: int) -> Frame:
    """Random rows, each asked of every one of ``experts``."""
    x = torch.randn(rows, worker.hidden_size, generator=torch.Generator().manual_seed(rows))
    indices = torch.arange(rows, dtype=torch.int32).repeat(len(experts))
    offsets = [rows * position for position in range(len(experts) + 1)]
    dtype = _row_dtype(worker)
    if dtype is torch.int8:
        return Frame(layer, (x * 32).clamp(-127, 127).to(dtype), torch.ones(rows) / 32, experts, offsets, indices)
    return Frame(layer, x.to(dtype), None, experts, offsets, indices)


def _row_dtype(worker: expert_pb2.DescribeResponse) -> torch.dtype:
    """Of the rows that it takes."""
    return torch.int8 if worker.quantization == "int8" else TORCH_DTYPES[worker.row_dtype]


class _Stream:
    """One Forward stream with one call at a time."""

    def __init__(self, stub: expert_pb2_grpc.ExpertServiceStub) -> None:
        self._requests: queue.SimpleQueue[expert_pb2.ForwardRequest | None] = queue.SimpleQueue()
        self._answers = stub.Forward(iter(self._requests.get, None), timeout=PROBE_SECONDS)
        self._ids = itertools.count(1)

    def ask(self, frame: Frame, version: str = "") -> tuple[float, float]:
        """Seconds of the round trip and of computing. Raises ConsiliumError, but not where ``version`` is refused."""
        call = encode_call(frame, next(self._ids), int(CALL_SECONDS * 1e3))
        call.weight_version = version
        request = expert_pb2.ForwardRequest(call=call)
        start = time.perf_counter()
        self._requests.put(request)
        answer = next(self._answers)
        seconds = time.perf_counter() - start
        if answer.WhichOneof("outcome") == "result":
            return seconds, answer.result.compute_us / 1e6
        if not version:
            raise from_call_error(answer.error)
        return seconds, 0.0

    def close(self) -> None:
        """Say that no more calls come."""
        self._requests.put(None)
        self._answers.cancel()


@contextmanager
def _stream(address: str) -> Iterator[_Stream]:
    with grpc.insecure_channel(address, options=channel_options()) as channel:
        stream = _Stream(expert_pb2_grpc.ExpertServiceStub(channel))
        try:
            yield stream
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            stream.close()
