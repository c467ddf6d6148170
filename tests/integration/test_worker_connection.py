"""Calls to one worker over gRPC: answered, failed, given up, cancelled; and what breaks its connections."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from consilium.errors import Cancelled, DeadlineExceeded, ExpertUnavailable, WireError
from consilium.frames import Frame
from consilium.wire import encode_tensor
from protos.expert.v1 import expert_pb2
from protos.tensor.v1 import tensor_pb2
from tests.integration.fake_workers import (
    FRAME,
    MODEL,
    SECONDS,
    connected,
    describe,
    following,
    serving,
    status,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_calls_are_answered_in_any_order_and_fail_alone() -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker) for _ in range(3)]
        ids = [await worker.receive_call() for _ in calls]
        worker.answer(ids[2], 3.0)
        worker.refuse(ids[1], "RESOURCE_EXHAUSTED", "too many")
        worker.answer(ids[2], 4.0)  # twice: the first stands
        worker.answer(12345)  # nobody asked
        worker.answer(ids[0], 1.0)
        for call, value in ((calls[2], 3.0), (calls[0], 1.0)):
            reply = await gateway.outcome(call)
            rows = reply.rows(1, MODEL.hidden_size, torch.float32)
            assert torch.equal(rows, torch.full((1, MODEL.hidden_size), value))
            assert reply.bytes_sent > 4 * MODEL.hidden_size
            assert reply.bytes_received > 4 * MODEL.hidden_size
        assert "too many" in str(await gateway.failure(calls[1]))
        assert connected(worker)(gateway.views[-1])


async def test_a_call_without_an_answer_makes_the_worker_prove_itself() -> None:
    async with serving(describe(), describe()) as (hung, worker), following(hung.address, worker.address) as gateway:
        await gateway.until(connected(hung, worker))
        hung.answers.clear()
        waiting = gateway.send(hung)
        assert isinstance(await gateway.failure(gateway.send(hung, seconds=0.2)), DeadlineExceeded)
        # Nothing more is sent there, and what was underway is to be had from a replica.
        error = await gateway.failure(waiting)
        assert isinstance(error, ExpertUnavailable)
        assert "did not answer in time" in str(error)
        view = await gateway.until(connected(worker))
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        await asyncio.wait_for(hung.closed.get(), SECONDS)
        for _ in range(4):  # on both connections
            await asyncio.wait_for(hung.asked.get(), SECONDS)
        assert connected(worker)(gateway.views[-1])  # it was asked again, and has not answered
        while not hung.received.empty():
            hung.received.get_nowait()
        hung.answers.set()
        await gateway.until(connected(hung, worker))
        call = gateway.send(hung)
        hung.answer(await hung.receive_call())
        await gateway.outcome(call)


async def test_a_call_that_nobody_wants_any_more_is_cancelled_and_answered_all_the_same() -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        call, other = gateway.send(worker), gateway.send(worker)
        call_id, other_id = await worker.receive_call(), await worker.receive_call()
        call.withdraw()
        assert (await worker.receive()).cancel.call_id == call_id
        worker.refuse(call_id, "CANCELLED", "cancelled by its caller before it was computed")
        assert isinstance(await gateway.failure(call), Cancelled)
        call.withdraw()  # too late: nothing is sent
        other.withdraw()
        assert (await worker.receive()).cancel.call_id == other_id
        worker.answer(other_id)  # it was being computed
        await gateway.outcome(other)


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    async with (
        serving(describe(), describe()) as (leaving, worker),
        following(leaving.address, worker.address) as gateway,
    ):
        view = await gateway.until(connected(leaving, worker))
        held = view.workers[leaving.address]
        taken, late = gateway.send(leaving), gateway.send(leaving)
        first, second = await leaving.receive_call(), await leaving.receive_call()
        leaving.refuse(second, "UNAVAILABLE", "draining: ask another replica")
        error = await gateway.failure(late)
        assert isinstance(error, ExpertUnavailable)
        assert error.retryable
        view = await gateway.until(connected(worker))
        assert "draining" in status(view, leaving.address).detail
        assert {each for holders in view.placement.holders.values() for each in holders} == {worker.address}
        # An engine that still has the old view is told at once, without the worker.
        assert "draining" in str(await gateway.failure(held.send(FRAME, time.monotonic() + SECONDS)))
        assert leaving.received.empty()
        leaving.answer(first)
        assert (await gateway.outcome(taken)).bytes_received
        assert leaving.closed.empty()


async def test_a_broken_stream_settles_its_calls_and_is_opened_again() -> None:
    async with (
        serving(describe(), describe()) as (broken, worker),
        following(broken.address, worker.address) as gateway,
    ):
        await gateway.until(connected(broken, worker))
        calls = [gateway.send(broken) for _ in range(3)]
        for _ in calls:
            await broken.receive_call()
        elsewhere = gateway.send(worker)
        broken.streams[-1].to_send.put_nowait(None)
        for call in calls:
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "broken by the test" in str(error)
        worker.answer(await worker.receive_call())
        await gateway.outcome(elsewhere)
        await gateway.until(connected(worker))
        await gateway.until(connected(broken, worker))
        call = gateway.send(broken)
        broken.answer(await broken.receive_call())
        await gateway.outcome(call)


PROMPT = replace(FRAME, prefill=True)


async def test_single_tokens_and_prompts_have_a_connection_each() -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker, frame=frame) for frame in (FRAME, PROMPT, FRAME, PROMPT)]
        ids = [await worker.receive_call() for _ in calls]
        assert len({stream.peer for stream in worker.streams}) == len(worker.streams) == 2
        for call_id in ids:
            worker.answer(call_id)
        for call in calls:
            await gateway.outcome(call)


@pytest.mark.parametrize("broken", [FRAME, PROMPT], ids=["decode", "prefill"])
async def test_when_one_connection_breaks_the_calls_of_both_are_had_elsewhere(broken: Frame) -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        calls = [gateway.send(worker, frame=broken)]
        await worker.receive_call()
        calls.append(gateway.send(worker, frame=PROMPT if broken is FRAME else FRAME))
        await worker.receive_call()
        worker.streams[0].to_send.put_nowait(None)
        for call in calls:
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "broken by the test" in str(error)
        await gateway.until(connected())
        await gateway.until(connected(worker))


async def test_behind_a_balancer_prompts_share_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Every connection leads to another worker: the second one is not used."""
    async with serving(describe()) as (worker,):
        worker.restless = True
        with caplog.at_level("INFO", "gateway.worker_connection"):
            async with following(worker.address) as gateway:
                await gateway.until(connected(worker))
                calls = [gateway.send(worker, frame=frame) for frame in (FRAME, PROMPT)]
                ids = [await worker.receive_call() for _ in calls]
                assert len({stream.peer for stream in worker.streams}) == 1
                for call_id in ids:
                    worker.answer(call_id)
                for call in calls:
                    await gateway.outcome(call)
    assert "prompts share its connection" in caplog.text


async def test_bytes_that_are_no_answer_end_the_session_and_nothing_else() -> None:
    async with serving(describe(), describe()) as (liar, worker), following(liar.address, worker.address) as gateway:
        await gateway.until(connected(liar, worker))
        whole = expert_pb2.ForwardResponse(call_id=1, result=expert_pb2.Result(rows=encode_tensor(torch.ones(9))))
        for said in (b"\xff\xff\xff", whole.SerializeToString()[:-5]):
            call = gateway.send(liar)
            liar.say(said, await liar.receive_call())
            error = await gateway.failure(call)
            assert isinstance(error, ExpertUnavailable)
            assert "no ForwardResponse" in str(error)
            elsewhere = gateway.send(worker)
            worker.answer(await worker.receive_call())
            await gateway.outcome(elsewhere)
            await gateway.until(connected(worker))
            await gateway.until(connected(liar, worker))


@pytest.mark.parametrize(
    "lie",
    [
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "data": bytes(4 * MODEL.hidden_size - 1)},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [2**32 - 1, MODEL.hidden_size], "data": b""},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "offset": 0},
        {"dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [1, MODEL.hidden_size], "offset": 2**64 - 4},
        {"dtype": tensor_pb2.DTYPE_INT8, "shape": [1, MODEL.hidden_size], "data": bytes(MODEL.hidden_size)},
    ],
    ids=["truncated", "a huge shape", "nothing attached", "past the end", "another dtype"],
)
@pytest.mark.parametrize("attached", [b"", b"short"])
async def test_rows_that_lie_are_refused_and_the_stream_goes_on(lie: dict[str, Any], attached: bytes) -> None:
    async with serving(describe()) as (worker,), following(worker.address) as gateway:
        await gateway.until(connected(worker))
        call = gateway.send(worker)
        call_id = await worker.receive_call()
        result = expert_pb2.Result(rows=tensor_pb2.Tensor(**lie))
        worker.say(expert_pb2.ForwardResponse(call_id=call_id, result=result, attachment=attached))
        reply = await gateway.outcome(call)
        with pytest.raises(WireError, match="result rows: "):
            reply.rows(1, MODEL.hidden_size, torch.float32)
        call = gateway.send(worker)
        worker.answer(await worker.receive_call())
        await gateway.outcome(call)


async def test_a_port_where_nobody_listens_is_told() -> None:
    async with serving(describe()) as (gone,):
        nobody = gone.address
    async with following(nobody) as gateway:
        view = await gateway.until(lambda view: "connect" in status(view, nobody).detail.replace("connecting", ""))
        assert not status(view, nobody).connected
        assert not view.workers
