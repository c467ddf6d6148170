"""Times one worker over the connection that the engine would have, with calls that it answers like any other.

Letters: D hidden size.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import grpc
import torch

from consilium.config import ExpertGroupConfig, has_integer_rows
from consilium.errors import ExpertUnavailable
from consilium.frames import Frame
from consilium.rpc import DEFAULT_MAX_FRAME, channel_options, from_rpc_error
from consilium.tokens import Metadata
from consilium.wire import TORCH_DTYPES
from gateway.doctor.verdict import FEW, MANY, Timing
from gateway.mailbox import Completion, Mailbox
from gateway.worker import Reply
from gateway.worker_connection import DESCRIBE_TIMEOUT, Expectations, WorkerConnection
from protos.expert.v1 import expert_pb2, expert_pb2_grpc

CONNECT_SECONDS = 10.0
CALL_SECONDS = 30.0
WARMUP = 5
LARGE_BYTES = 4 * 2**20  # of the rows of the call that measures the bandwidth
LARGE_CALLS = 10
EXPERT_CALLS = 20  # of each size, each to another expert, so that its weights are in no cache

Description = expert_pb2.DescribeResponse


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured of one worker, and over what: a local link, or gRPC."""

    timing: Timing
    local_link: bool


def describe(address: str, metadata: Metadata = ()) -> Description:
    """What the worker says of itself. Raises ConsiliumError when it cannot be asked."""
    with grpc.insecure_channel(address, options=channel_options()) as channel:
        try:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            return stub.Describe(expert_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def probe(address: str, worker: Description, calls: int, local_links: bool = True, metadata: Metadata = ()) -> Probe:
    """Medians of ``calls`` calls without rows, of large ones without experts, and of calls of one expert.

    Raises ConsiliumError.
    """
    places = [(layer.layer, expert) for layer in worker.layers for expert in layer.experts]
    if not places:
        raise ExpertUnavailable("it holds no expert")
    layer = places[0][0]
    row_bytes = worker.hidden_size * _row_dtype(worker).itemsize
    large = _frame(worker, layer, [], -(-LARGE_BYTES // row_bytes))
    with _connected(address, worker, local_links, metadata) as line:
        empty = line.round_trip(_frame(worker, layer, [], 0), calls)
        longer = line.round_trip(large, LARGE_CALLS)
        few, many = (
            median([line.compute_seconds(_frame(worker, where, [expert], rows)) for where, expert in _spread(places)])
            for rows in (FEW, MANY)
        )
        return Probe(Timing(empty, max(0.0, longer - empty) / large.rows.nbytes, few, many), line.local_link)


def _spread(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Some of the experts, from all the layers; the same ones again where there are few."""
    step = max(1, len(places) // EXPERT_CALLS)
    return list(itertools.islice(itertools.cycle(places[::step]), EXPERT_CALLS))


def _frame(worker: Description, layer: int, experts: list[int], rows: int) -> Frame:
    """Random rows, each asked of every one of ``experts``."""
    x = torch.randn(rows, worker.hidden_size, generator=torch.Generator().manual_seed(rows))
    indices = torch.arange(rows, dtype=torch.int32).repeat(len(experts))
    offsets = [rows * position for position in range(len(experts) + 1)]
    dtype = _row_dtype(worker)
    if dtype is torch.int8:
        return Frame(layer, (x * 32).clamp(-127, 127).to(dtype), torch.ones(rows) / 32, experts, offsets, indices)
    return Frame(layer, x.to(dtype), None, experts, offsets, indices)


def _row_dtype(worker: Description) -> torch.dtype:
    """Of the rows that it takes."""
    return torch.int8 if has_integer_rows(worker.quantization) else TORCH_DTYPES[worker.row_dtype]


class _Line:
    """A connection with one call at a time."""

    def __init__(self, connection: WorkerConnection, mailbox: Mailbox) -> None:
        self._connection, self._mailbox = connection, mailbox

    @property
    def local_link(self) -> bool:
        return self._connection.local_link

    def round_trip(self, frame: Frame, calls: int) -> float:
        """The median, in seconds."""
        times = []
        for _ in range(WARMUP + calls):
            start = time.perf_counter()
            self._ask(frame)
            times.append(time.perf_counter() - start)
        return median(times[WARMUP:])

    def compute_seconds(self, frame: Frame) -> float:
        """What the worker says it computed."""
        return self._ask(frame).compute_us / 1e6

    def _ask(self, frame: Frame) -> Reply:
        reply = self._mailbox.drive(_await(self._connection.send(frame, time.monotonic() + CALL_SECONDS)))
        reply.release()
        return reply


async def _await(completion: Completion[Reply]) -> Reply:
    return await completion


@contextmanager
def _connected(address: str, worker: Description, local_links: bool, metadata: Metadata) -> Iterator[_Line]:
    """The engine's connection, with its I/O thread. Raises ExpertUnavailable when it does not come about."""
    mailbox = Mailbox(lambda _: None)
    fits = Expectations(
        *(worker.model_fingerprint, worker.quantization, worker.row_dtype, worker.hidden_size),
        local_links=local_links,
        metadata=metadata,
        weight_version=worker.weight_version,
    )
    loop = asyncio.new_event_loop()
    group = ExpertGroupConfig(endpoint=f"grpc://{address}")

    async def make() -> WorkerConnection:
        return WorkerConnection(
            worker.group, address, group, DEFAULT_MAX_FRAME, fits, mailbox, lambda: mailbox.post(None)
        )

    connection = loop.run_until_complete(make())
    task = loop.create_task(connection.run())
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), name="io", daemon=True)
    thread.start()
    try:
        while connection.description is None:
            if not mailbox.receive(CONNECT_SECONDS):
                raise ExpertUnavailable(connection.detail)
        yield _Line(connection, mailbox)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
