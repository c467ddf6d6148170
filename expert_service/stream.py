"""One open Forward stream: calls in, answers out in whatever order they are done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from consilium.attachment import Attachment, Parts
from consilium.errors import ConsiliumError, InvalidRequest
from consilium.frames import encode_result
from consilium.rpc import to_call_error
from expert_service.call_queue import Job
from expert_service.calls import Computed
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)


class Answer(asyncio.Future[Computed]):
    """What a call comes to. To cancel it is for a caller that is gone: then nobody is answered."""

    job: Job | None = None

    def withdraw(self) -> None:
        """Nobody wants it any more. It comes all the same: a call that waits is dropped and answered with Cancelled."""
        if self.job is not None:
            self.job.cancelled = True


Request = tuple[expert_pb2.ForwardRequest, Attachment | None]
# Queues a call, or raises.
Submit = Callable[[expert_pb2.Call, Attachment | None], Answer]


class ForwardStream:
    """Nothing a caller sends ends it: every call gets an answer of its own, also one that is cancelled."""

    def __init__(self, submit: Submit, max_unread: int) -> None:
        """No more calls are read while more than ``max_unread`` bytes of answers wait for the caller to read them."""
        self._submit, self._max_unread = submit, max_unread
        self._computing: dict[int, Answer] = {}
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()  # None is the end
        self._unread_bytes = 0
        self._room = asyncio.Event()
        self._ending = False

    async def run(
        self,
        requests: AsyncIterator[Request],
        write: Callable[[bytes], Awaitable[object]],
    ) -> None:
        """Answer ``requests`` until they end or :meth:`end` is called, and all that was taken is answered.

        ``write`` gets ForwardResponses as they travel.

        Raises what reading ``requests`` raised.
        """
        reading = asyncio.ensure_future(self._read(requests))
        try:
            while (response := await self._answers.get()) is not None:
                await write(response)
                self._unread_bytes -= len(response)
                self._room.set()
            if reading.done():
                reading.result()  # raises what is wrong with the stream itself
        finally:  # also when the caller is gone: then nobody wants the rest
            reading.cancel()
            for answer in self._computing.values():
                answer.cancel()

    def end(self) -> None:
        """Let :meth:`run` return as soon as every call taken is answered."""
        self._ending = True
        self._end_if_idle()

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request, attachment in requests:
                self._take(request, attachment)
                while self._unread_bytes > self._max_unread:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self.end()

    def _take(self, request: expert_pb2.ForwardRequest, attachment: Attachment | None) -> None:
        kind = request.WhichOneof("kind")
        if kind == "call":
            self._start(request.call, attachment)
        elif kind == "cancel":
            self._cancel(request.cancel.call_id)
        else:
            self._answer_error(0, InvalidRequest("the request holds neither a call nor a cancel"))

    def _start(self, call: expert_pb2.Call, attachment: Attachment | None) -> None:
        try:
            if call.call_id in self._computing:
                raise InvalidRequest(f"call id {call.call_id} is in use on this stream")
            answer = self._submit(call, attachment)
        except ConsiliumError as error:
            self._answer_error(call.call_id, error)
        except Exception as error:  # a bug: this call fails, the stream goes on
            logger.exception("a call for layer %d was not taken", call.layer)
            self._answer_error(call.call_id, error)
        else:
            self._computing[call.call_id] = answer
            answer.add_done_callback(partial(self._finish, call.call_id, attachment is not None))

    def _cancel(self, call_id: int) -> None:
        answer = self._computing.get(call_id)
        if answer is not None:  # otherwise it is answered already
            answer.withdraw()

    def _finish(self, call_id: int, attach: bool, answer: asyncio.Future[Computed]) -> None:
        if not answer.cancelled():
            del self._computing[call_id]
            error = answer.exception()
            if error is None:
                self._answer_rows(call_id, answer.result(), attach)
            else:
                self._answer_error(call_id, error)
        self._end_if_idle()

    def _answer_rows(self, call_id: int, done: Computed, attach: bool) -> None:
        """As the call came, so it is answered: with its tensors attached, or in the message."""
        parts = Parts()
        result = encode_result(done.rows, done.queue_us, done.compute_us, parts.place if attach else None)
        self._answer(parts.pack(expert_pb2.ForwardResponse(call_id=call_id, result=result)))

    def _answer_error(self, call_id: int, error: BaseException) -> None:
        self._answer(expert_pb2.ForwardResponse(call_id=call_id, error=to_call_error(error)).SerializeToString())

    def _answer(self, packed: bytes) -> None:
        self._unread_bytes += len(packed)
        self._answers.put_nowait(packed)

    def _end_if_idle(self) -> None:
        if self._ending and not self._computing:
            self._answers.put_nowait(None)
