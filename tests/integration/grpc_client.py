"""A worker as its callers see it, with every wait bounded."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import torch
from torch import Tensor

from consilium.frames import Frame, decode_result
from consilium.quantization import quantize_rows
from consilium.rpc import channel_options
from protos.expert.v1 import expert_pb2, expert_pb2_grpc

SECONDS = 60.0


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel to ``grpc://HOST:PORT``."""
    with grpc.insecure_channel(address.removeprefix("grpc://"), options=channel_options()) as channel:
        yield channel


class Conversation:
    """One Forward stream; :meth:`receive` takes the next answer, whichever call it is for."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[expert_pb2.ForwardRequest | None] = queue.SimpleQueue()
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        self.stream = stub.Forward(iter(self._requests.get, None), timeout=SECONDS)

    def send(self, *calls: expert_pb2.Call) -> None:
        for call in calls:
            self._requests.put(expert_pb2.ForwardRequest(call=call))

    def send_request(self, request: expert_pb2.ForwardRequest) -> None:
        self._requests.put(request)

    def cancel(self, call_id: int) -> None:
        self._requests.put(expert_pb2.ForwardRequest(cancel=expert_pb2.Cancel(call_id=call_id)))

    def finish(self) -> None:
        """Say that no more calls come."""
        self._requests.put(None)

    def receive(self) -> expert_pb2.ForwardResponse:
        return next(self.stream)

    def receive_all(self) -> list[expert_pb2.ForwardResponse]:
        """The rest of the answers, to the end of the stream."""
        return list(self.stream)

    def ask(self, call: expert_pb2.Call) -> expert_pb2.ForwardResponse:
        """One call alone on the stream and its answer."""
        self.send(call)
        response = self.receive()
        assert response.call_id == call.call_id
        return response


@contextmanager
def conversation(address: str) -> Iterator[Conversation]:
    with connected(address) as channel:
        opened = Conversation(channel)
        try:
            yield opened
        finally:
            opened.finish()


def make_frame(hidden_size: int, layer: int, experts: list[int], rows: int) -> Frame:
    """Random token rows, each asked of every expert, in falling order."""
    x = torch.randn(rows, hidden_size, generator=torch.Generator().manual_seed(rows))
    order = torch.arange(rows - 1, -1, -1, dtype=torch.int32)
    offsets = [rows * position for position in range(len(experts) + 1)]
    return Frame(layer, x, None, experts, offsets, order.repeat(len(experts)))


def quantized(frame: Frame) -> Frame:
    rows, scales = quantize_rows(frame.rows)
    return Frame(frame.layer, rows, scales, frame.experts, frame.offsets, frame.indices)


def rows_of(result: expert_pb2.Result, frame: Frame, dtype: torch.dtype = torch.float32) -> Tensor:
    """The result's rows [P, D] as what ``frame`` asked for."""
    return decode_result(result, frame.indices.numel(), frame.rows.shape[1], dtype)
