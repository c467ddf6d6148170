"""A gateway on this host: calls come in packets on its socket, their tensors in the memory that it shares.

Only the thread that computes uses a link once it is open.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from functools import partial
from typing import Protocol

from consilium.errors import ConsiliumError, InvalidRequest
from consilium.link_packets import (
    CALL,
    LENGTHS,
    CallPacket,
    RowFormat,
    pack_error,
    pack_result,
    unpack_cancel,
)
from consilium.local_socket import PACKET
from consilium.rpc import to_call_error
from consilium.shared_memory import SharedMemory
from expert_service.call_queue import Job, Outcome
from expert_service.calls import Call, SharedCall

logger = logging.getLogger(__name__)

MOST_PACKETS = 64  # taken at a time, so that one caller cannot keep the thread from computing


class Take(Protocol):
    """Queues a call, or raises."""

    def __call__(self, call: Call, answer: partial[None]) -> Job: ...


class LocalLink:
    """Every call gets an answer of its own, also one that is cancelled: until then its block is not the caller's."""

    def __init__(self, link: socket.socket, memory: SharedMemory, form: RowFormat, take: Take) -> None:
        self._socket, self._memory, self._form, self._take = link, memory, form, take
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
            packet = self._buffer[:count]
            if LENGTHS.get(packet[0]) != count:
                logger.warning("a local link is closed: what came on it is neither a call nor a cancel")
                return False
            self._accept(packet)
        return not self._broken

    def close(self) -> None:
        """Nobody wants the answers any more."""
        for job in self._jobs.values():
            job.cancelled = True
        self._jobs.clear()
        self._socket.close()

    def _accept(self, packet: memoryview) -> None:
        if packet[0] == CALL:
            self._start(CallPacket.unpack(packet))
            return
        job = self._jobs.get(unpack_cancel(packet))
        if job is not None:
            job.cancelled = True

    def _start(self, packet: CallPacket) -> None:
        call_id = packet.call_id
        try:
            if call_id in self._jobs:
                raise InvalidRequest(f"call id {call_id} is in use on this link")
            call = SharedCall(packet, self._memory, self._form)
            self._jobs[call_id] = self._take(call, partial(self._answer, call_id))
        except Exception as error:  # this call fails, the link goes on
            if not isinstance(error, ConsiliumError):
                logger.exception("a call for layer %d was not taken", packet.layer)
            self._send(pack_error(call_id, to_call_error(error).SerializeToString()))

    def _answer(self, call_id: int, outcome: Outcome) -> None:
        if self._jobs.pop(call_id, None) is None:  # the caller is gone
            return
        if isinstance(outcome, Exception):
            self._send(pack_error(call_id, to_call_error(outcome).SerializeToString()))
        else:
            self._send(pack_result(call_id, outcome.queue_us, outcome.compute_us))

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except OSError:  # gone, or it does not read its answers
            self._broken = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
