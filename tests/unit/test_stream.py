from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from consilium.attachment import Attachment, unpack
from consilium.errors import WireError
from consilium.wire import decode_tensor
from expert_service.calls import Computed
from expert_service.stream import Answer, ForwardStream, Request
from protos.expert.v1 import expert_pb2

UNREAD = 10_000
RESULT = Computed(torch.zeros(250), 0, 0)


async def settle() -> None:
    """Let everything run that can run now."""
    for _ in range(200):
        await asyncio.sleep(0)


class Caller:
    """Sends ``count`` calls as fast as they are taken, and reads answers while ``reading`` is set."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.submitted: dict[int, Answer] = {}
        self.read: list[expert_pb2.ForwardResponse] = []
        self.reading = asyncio.Event()
        self.ended = asyncio.Event()

    async def requests(self) -> AsyncIterator[Request]:
        for number in range(self.count):
            yield expert_pb2.ForwardRequest(call=expert_pb2.Call(call_id=number)), None
        await self.ended.wait()

    def submit(self, call: expert_pb2.Call, attachment: Attachment | None) -> Answer:
        assert attachment is None
        if call.call_id == 77:
            raise RuntimeError("a bug")
        answer = Answer()
        self.submitted[call.call_id] = answer
        return answer

    async def write(self, response: bytes) -> None:
        await self.reading.wait()
        self.read.append(expert_pb2.ForwardResponse.FromString(response))


def test_calls_are_not_read_while_answers_are_not() -> None:
    async def body() -> None:
        caller = Caller(count=60)

        def at_once(call: expert_pb2.Call, attachment: Attachment | None) -> Answer:
            answer = caller.submit(call, attachment)
            answer.set_result(RESULT)
            return answer

        async def requests() -> AsyncIterator[Request]:
            async for request in caller.requests():
                yield request
                await settle()  # the answer is in the queue before the next call comes

        stream = ForwardStream(at_once, UNREAD)
        running = asyncio.ensure_future(stream.run(requests(), caller.write))
        for _ in range(100):
            await settle()
        assert 5 < len(caller.submitted) < 15  # not 60
        caller.reading.set()
        caller.ended.set()
        await asyncio.wait_for(running, 30)
        assert [response.call_id for response in caller.read] == list(range(60))

    asyncio.run(body())


def test_answers_come_in_the_order_they_are_done() -> None:
    async def body() -> None:
        caller = Caller(count=4)
        caller.reading.set()
        running = asyncio.ensure_future(ForwardStream(caller.submit, UNREAD).run(caller.requests(), caller.write))
        await settle()
        for number in (2, 0, 3, 1):
            if number == 3:
                caller.submitted[number].set_exception(WireError("rows: too few"))
            else:
                caller.submitted[number].set_result(RESULT)
            await settle()
        caller.ended.set()
        await asyncio.wait_for(running, 30)
        assert [response.call_id for response in caller.read] == [2, 0, 3, 1]
        assert [response.WhichOneof("outcome") for response in caller.read] == ["result", "result", "error", "result"]

    asyncio.run(body())


def test_an_ending_stream_waits_for_what_it_has_taken() -> None:
    async def body() -> None:
        caller = Caller(count=2)
        caller.reading.set()
        stream = ForwardStream(caller.submit, UNREAD)
        running = asyncio.ensure_future(stream.run(caller.requests(), caller.write))
        await settle()
        stream.end()
        caller.submitted[1].set_result(RESULT)
        await settle()
        assert not running.done()
        caller.submitted[0].set_result(RESULT)
        await asyncio.wait_for(running, 30)
        assert [response.call_id for response in caller.read] == [1, 0]

    asyncio.run(body())


def test_a_caller_that_is_gone_gives_up_its_calls() -> None:
    async def body() -> None:
        caller = Caller(count=3)
        running = asyncio.ensure_future(ForwardStream(caller.submit, UNREAD).run(caller.requests(), caller.write))
        await settle()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert all(answer.cancelled() for answer in caller.submitted.values())

    asyncio.run(body())


def test_a_bug_in_taking_a_call_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        caller = Caller(count=79)
        caller.reading.set()
        running = asyncio.ensure_future(ForwardStream(caller.submit, UNREAD).run(caller.requests(), caller.write))
        await settle()
        for answer in caller.submitted.values():
            answer.set_result(RESULT)
        caller.ended.set()
        await asyncio.wait_for(running, 30)
        codes = {response.call_id: response.error.code for response in caller.read}
        assert codes == {number: "INTERNAL" if number == 77 else "" for number in range(79)}

    asyncio.run(body())
    assert "a call for layer 0 was not taken" in caplog.text


def test_rows_are_attached_when_the_call_came_with_an_attachment() -> None:
    rows = torch.arange(12, dtype=torch.float32)

    async def body() -> None:
        caller, taken = Caller(count=0), list[Attachment | None]()
        caller.reading.set()

        def submit(_call: expert_pb2.Call, attachment: Attachment | None) -> Answer:
            taken.append(attachment)
            answer = Answer()
            answer.set_result(Computed(rows, 0, 0))
            return answer

        attachment = Attachment(b"anything")

        async def requests() -> AsyncIterator[Request]:
            for call_id, attached in ((1, attachment), (2, None)):
                yield expert_pb2.ForwardRequest(call=expert_pb2.Call(call_id=call_id)), attached

        written = list[bytes]()

        async def write(response: bytes) -> None:
            written.append(response)

        await asyncio.wait_for(ForwardStream(submit, UNREAD).run(requests(), write), 30)
        assert taken == [attachment, None]
        for data, is_attached in zip(written, (True, False), strict=True):
            response, found = unpack(expert_pb2.ForwardResponse, data)
            assert (found is not None, response.result.rows.HasField("offset")) == (is_attached, is_attached)
            assert decode_tensor(response.result.rows, "rows", torch.float32, (12,), found).equal(rows)

    asyncio.run(body())
