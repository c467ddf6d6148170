"""A gateway on this host: calls come in packets on its socket, their tensors in the memory that it shares.

Only the thread that computes uses a link once it is open.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from functools import partial
from typing import Protocol

from consilium.errors import ConsiliumError, InvalidRequest
from consilium.link_packets import (
    ARENA,
    CALL,
    CANCEL,
    LENGTHS,
    ArenaPacket,
    CallPacket,
    RowFormat,
    StepPacket,
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

CLOSING_SECONDS = 1.0  # for a step on the device to end
MOST_PACKETS = 64  # taken at a time, so that one caller cannot keep the thread from computing


class Take(Protocol):
    """Queues a call, or raises."""

    def __call__(self, call: Call, answer: partial[None]) -> Job: ...


class Steps(Protocol):
    """Whole steps on a device (expert_service.device_steps)."""

    def submit(self, packet: ArenaPacket | StepPacket, answer: Callable[[Exception | tuple[int, int]], object]) -> None:
        """Another thread answers. Raises ExpertUnavailable."""

    def close(self, seconds: float) -> None: ...


class LocalLink:
    """Every call gets an answer of its own, also one that is cancelled: until then its block is not the caller's."""

    def __init__(
        self, link: socket.socket, memory: SharedMemory, form: RowFormat, take: Take, steps: Steps | None = None
    ) -> None:
        self._socket, self._memory, self._form, self._take, self._steps = link, memory, form, take, steps
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
        if self._steps is not None:
            self._steps.close(CLOSING_SECONDS)
        self._socket.close()

    def _accept(self, packet: memoryview) -> None:
        if packet[0] == CALL:
            self._start(CallPacket.unpack(packet))
        elif packet[0] == CANCEL:
            job = self._jobs.get(unpack_cancel(packet))
            if job is not None:
                job.cancelled = True
        else:
            self._step(ArenaPacket.unpack(packet) if packet[0] == ARENA else StepPacket.unpack(packet))

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

    def _step(self, packet: ArenaPacket | StepPacket) -> None:
        answer = partial(self._answer_step, packet.call_id)
        try:
            if self._steps is None:
                raise InvalidRequest("this worker computes no steps on a device")
            self._steps.submit(packet, answer)
        except ConsiliumError as error:
            answer(error)

    def _answer_step(self, call_id: int, outcome: Exception | tuple[int, int]) -> None:
        if isinstance(outcome, Exception):
            self._send(pack_error(call_id, to_call_error(outcome).SerializeToString()))
        else:
            self._send(pack_result(call_id, *outcome))

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
