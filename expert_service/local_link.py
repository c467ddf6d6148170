"""A gateway on this host: calls come in packets on its socket, large tensors in the memory that it shares.

Only the thread that computes uses a link once it is open.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from functools import partial
from typing import Protocol

from google.protobuf.message import DecodeError

from consilium.errors import ConsiliumError, InvalidRequest
from consilium.local_socket import PACKET
from consilium.rpc import to_call_error
from consilium.shared_memory import SharedMemory
from expert_service.call_queue import Job, Outcome
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)

MOST_PACKETS = 64  # taken at a time, so that one caller cannot keep the thread from computing


class Take(Protocol):
    """Queues a call, or raises."""

    def __call__(self, call: expert_pb2.Call, answer: partial[None], memory: SharedMemory) -> Job: ...


class LocalLink:
    """Every call gets an answer of its own, unless the caller cancelled it or is gone."""

    def __init__(self, link: socket.socket, memory: SharedMemory, take: Take) -> None:
        self._socket, self._memory, self._take = link, memory, take
        self._jobs: dict[int, Job] = {}
        self._buffer = memoryview(bytearray(PACKET))
        self._broken = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> bool:
        """Submit what has come, without waiting; False when the link has ended."""
        for _ in range(MOST_PACKETS):
            try:
                count = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                return False
            if not count:
                return False
            try:
                request = expert_pb2.ForwardRequest.FromString(bytes(self._buffer[:count]))
            except DecodeError:
                logger.warning("a local link is closed: what came on it is no ForwardRequest")
                return False
            self._accept(request)
        return not self._broken

    def close(self) -> None:
        """Nobody wants the answers any more."""
        for job in self._jobs.values():
            job.cancelled = True
        self._jobs.clear()
        self._socket.close()

    def _accept(self, request: expert_pb2.ForwardRequest) -> None:
        kind = request.WhichOneof("kind")
        if kind == "call":
            self._start(request.call)
        elif kind == "cancel":
            job = self._jobs.pop(request.cancel.call_id, None)
            if job is not None:
                job.cancelled = True
        else:
            self._send(0, InvalidRequest("the request holds neither a call nor a cancel"))

    def _start(self, call: expert_pb2.Call) -> None:
        try:
            if call.call_id in self._jobs:
                raise InvalidRequest(f"call id {call.call_id} is in use on this link")
            self._jobs[call.call_id] = self._take(call, partial(self._answer, call.call_id), self._memory)
        except Exception as error:  # this call fails, the link goes on
            if not isinstance(error, ConsiliumError):
                logger.exception("a call for layer %d was not taken", call.layer)
            self._send(call.call_id, error)

    def _answer(self, call_id: int, outcome: Outcome) -> None:
        del self._jobs[call_id]
        self._send(call_id, outcome)

    def _send(self, call_id: int, outcome: Outcome) -> None:
        response = expert_pb2.ForwardResponse(call_id=call_id)
        if isinstance(outcome, Exception):
            response.error.CopyFrom(to_call_error(outcome))
        else:
            response.result.CopyFrom(outcome)
        packet = response.SerializeToString()
        if len(packet) > PACKET:
            too_long = InvalidRequest(f"the result takes {len(packet)} bytes: more than a packet; give a result_offset")
            packet = expert_pb2.ForwardResponse(call_id=call_id, error=to_call_error(too_long)).SerializeToString()
        try:
            self._socket.send(packet)
        except OSError:  # gone, or it does not read its answers
            self._broken = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
