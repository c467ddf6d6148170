from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.config import RowDType
from consilium.errors import DeadlineExceeded, Overloaded, StalePlacement, TooLarge, WireError
from consilium.frames import Frame, encode_call, encode_result
from consilium.link_packets import pack_result, unpack_result
from consilium.quantization import quantize_rows
from expert_service.call_queue import Job, Outcome
from expert_service.calls import LONGEST_US, Call, Computed, MessageCall
from expert_service.executor import Executor
from expert_service.expert_memory import AllInMemory
from expert_service.frame_computer import Begun, FrameComputer
from expert_service.metrics import ServiceMetrics
from expert_service.servicer import ExpertServicer
from expert_service.store import ExpertStore
from expert_service.stream import Answer
from protos.expert.v1 import expert_pb2
from tests.unit.test_experts import HIDDEN, SIZE, expert, reference

LAYER = 3
MAX_FRAME = 2**16
DESCRIPTION = expert_pb2.DescribeResponse(model="m", group="g", max_batch=4)


def make_computer(max_batch: int = 4096, quantization: str = "none", dtype: RowDType = "float32") -> FrameComputer:
    """Experts 0, 1 and 4 of layer 3."""
    arithmetic = find_arithmetic("int8" if quantization == "int8" else "none", dtype, HIDDEN, SIZE)
    store = ExpertStore([LAYER])
    for number in (0, 1, 4):
        store.add(LAYER, number, arithmetic.prepare(expert(number)))
    return FrameComputer(store, arithmetic, HIDDEN, max_batch, MAX_FRAME)


def make_frame(rows: int = 5, experts: tuple[int, ...] = (0, 4)) -> Frame:
    """Every row asked of every expert, in falling order."""
    x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    order = torch.arange(rows - 1, -1, -1, dtype=torch.int32)
    offsets = [rows * position for position in range(len(experts) + 1)]
    return Frame(LAYER, x, None, list(experts), offsets, order.repeat(len(experts)))


def make_call(rows: int = 5) -> expert_pb2.Call:
    return encode_call(make_frame(rows), 1)


def numbered(pairs: int, deadline_ms: int = 0) -> expert_pb2.Call:
    """One that a Gate tells from others by its pairs."""
    return encode_call(make_frame(pairs, (0,)), 1, deadline_ms)


def make_job(call: expert_pb2.Call) -> Job:
    return Job(MessageCall(call), call.ByteSize(), lambda _: None)


def compute(computer: FrameComputer, *calls: expert_pb2.Call) -> list[Tensor]:
    """The rows of calls that are computed together; raises the first error."""
    outcomes = computer.compute([make_job(call) for call in calls])
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome.rows for outcome in outcomes if not isinstance(outcome, Exception)]


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 7, 10, 4096])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_frame_is_the_same_in_batches_of_any_size(max_batch: int, quantization: str) -> None:
    frame = make_frame()
    sent = frame
    if quantization == "int8":
        rows, scales = quantize_rows(frame.rows)
        sent = Frame(frame.layer, rows, scales, frame.experts, frame.offsets, frame.indices)
    call = encode_call(sent, 1)
    found = [compute(make_computer(each, quantization), call)[0] for each in (max_batch, 4096)]
    assert torch.equal(*found)
    expected = torch.cat([reference(expert(number), frame.rows.flip(0)) for number in (0, 4)]).float()
    assert (found[0] - expected).norm() / expected.norm() < (1e-6 if quantization == "none" else 3e-2)


def test_a_frame_without_rows() -> None:
    for frame in (make_frame(experts=()), make_frame(rows=0)):
        (rows,) = compute(make_computer(), encode_call(frame, 1))
        assert rows.shape == (0, HIDDEN)


def test_experts_that_are_not_held() -> None:
    computer = make_computer()
    with pytest.raises(StalePlacement, match=r"experts 2, 3 of layer 3 .* holds 0, 1, 4"):
        compute(computer, encode_call(make_frame(experts=(0, 2, 3)), 1))
    call = make_call()
    call.layer = 7
    with pytest.raises(StalePlacement, match=r"layer 7 .* holds layers 3"):
        compute(computer, call)
    call = make_call()
    call.weight_version = "x"
    with pytest.raises(StalePlacement, match="weight version 'x'"):
        compute(computer, call)


def test_a_call_or_a_result_over_the_largest_frame() -> None:
    computer = make_computer()
    call = make_call()
    assert computer.size(MessageCall(call)) == call.ByteSize() + 10 * HIDDEN * 4
    with pytest.raises(TooLarge, match=r"the call takes \d+ bytes, more than .* 64KiB"):
        computer.size(MessageCall(make_call(rows=300)))
    frame = make_frame(rows=1)
    many = Frame(LAYER, frame.rows, None, [0], [0, 1000], torch.zeros(1000, dtype=torch.int32))
    with pytest.raises(TooLarge, match="the result of 1000 rows takes 288000 bytes"):
        computer.size(MessageCall(encode_call(many, 1)))


class Gate(FrameComputer):
    """Computes nothing until it is opened; tells calls, and answers to them, apart by their pairs."""

    def __init__(self) -> None:
        self.max_batch, self.depth = 4096, 1
        self.opened, self.entered = threading.Event(), threading.Event()
        self.computed: list[int] = []
        self.failure: Exception | None = None

    def size(self, call: Call) -> int:
        return call.nbytes

    def begin(self, jobs: Sequence[Job]) -> Begun:
        self.entered.set()
        assert self.opened.wait(30)
        return Begun(list(jobs))

    def finish(self, begun: Begun) -> list[Outcome]:
        return [self._outcome(job) for job in begun.jobs]

    def _outcome(self, job: Job) -> Outcome:
        try:
            job.check()
        except Exception as error:
            return error
        if self.failure is not None:
            return self.failure
        self.computed.append(job.call.pairs)
        return Computed(torch.empty(0), queue_us=job.call.pairs, compute_us=0)


class Overlapped(Gate):
    """As a device has it: the next call is brought to it before the first one is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.max_batch, self.depth = 1, 2
        self.order: list[str] = []

    def begin(self, jobs: Sequence[Job]) -> Begun:
        self.order.append(f"begin {jobs[0].call.pairs}")
        return super().begin(jobs)

    def finish(self, begun: Begun) -> list[Outcome]:
        self.order.append(f"finish {begun.jobs[0].call.pairs}")
        return super().finish(begun)


def submit(executor: Executor, call: expert_pb2.Call) -> Answer:
    """As the servicer does it."""
    store = ExpertStore([])
    return ExpertServicer(
        DESCRIPTION, executor, ServiceMetrics(DESCRIPTION, executor, store, AllInMemory()), 1, store
    ).submit(call)


def run(
    body: Callable[[Executor, Gate], Awaitable[None]],
    max_queue: int = 4,
    max_bytes: int = 2**20,
    gate: Gate | None = None,
) -> Gate:
    gate = gate or Gate()

    async def main() -> None:
        executor = Executor(gate, max_queue, max_bytes)
        try:
            await asyncio.wait_for(body(executor, gate), 30)
        finally:
            gate.opened.set()
            assert executor.close(30)

    asyncio.run(main())
    return gate


async def outcome(answer: Answer) -> str:
    """What an answer came to: its result, the class of its error, or "cancelled"."""
    await asyncio.wait([answer])
    if answer.cancelled():
        return "cancelled"
    error = answer.exception()
    return str(answer.result().queue_us) if error is None else type(error).__name__


def test_calls_are_computed_in_order_off_the_event_loop() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        answers = [submit(executor, numbered(number)) for number in (1, 2, 3)]
        await asyncio.to_thread(gate.entered.wait)  # the loop goes on while a call is computed
        assert not any(answer.done() for answer in answers)
        gate.opened.set()
        assert [await outcome(answer) for answer in answers] == ["1", "2", "3"]

    assert run(body).computed == [1, 2, 3]


def test_a_full_queue_refuses_and_recovers() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        answers = [submit(executor, numbered(number)) for number in range(4)]
        with pytest.raises(Overloaded, match=r"4 calls .* try again"):
            submit(executor, numbered(1))
        gate.opened.set()
        await asyncio.wait(answers)
        assert await outcome(submit(executor, numbered(9))) == "9"

    run(body)


def test_the_queue_is_bounded_in_bytes() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        size = numbered(100).ByteSize()
        first = submit(executor, numbered(100))
        with pytest.raises(Overloaded, match=f"1 calls of {size} bytes wait"):
            submit(executor, numbered(130))
        gate.opened.set()
        await asyncio.wait([first])
        assert await outcome(submit(executor, numbered(130))) == "130"

    run(body, max_bytes=50_000)


def test_a_cancelled_call_is_not_computed() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        answers = [submit(executor, numbered(number)) for number in (1, 2, 3)]
        await asyncio.to_thread(gate.entered.wait)
        answers[1].cancel()
        await asyncio.sleep(0)  # the callback that tells the job
        gate.opened.set()
        assert [await outcome(answer) for answer in answers] == ["1", "cancelled", "3"]

    assert run(body).computed == [1, 3]


def test_a_call_past_its_deadline_is_not_computed() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        late = submit(executor, numbered(1, deadline_ms=1))
        patient = submit(executor, numbered(2, deadline_ms=60_000))
        await asyncio.sleep(0.01)  # the deadline itself is what passes here
        gate.opened.set()
        assert await outcome(late) == "DeadlineExceeded"
        assert "its 1 ms" in str(late.exception())
        assert await outcome(patient) == "2"

    assert run(body).computed == [2]


@pytest.mark.parametrize("failure", [WireError("rows"), RuntimeError("a bug"), MemoryError()])
def test_a_failed_call_fails_alone(failure: Exception) -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        gate.failure = failure
        gate.opened.set()
        assert await outcome(submit(executor, numbered(1))) == type(failure).__name__
        gate.failure = None
        assert await outcome(submit(executor, numbered(2))) == "2"

    run(body)


def test_the_deadline_is_looked_at_between_batches() -> None:
    job, batches = make_job(make_call()), 0

    class Late(Job):
        def check(self) -> None:
            nonlocal batches
            batches += 1
            if batches == 4:
                raise DeadlineExceeded("late")

    late = Late(job.call, job.size, job.answer)
    (outcome,) = make_computer(max_batch=1).compute([late])
    assert isinstance(outcome, DeadlineExceeded)
    assert batches == 4


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_calls_for_one_layer_are_computed_together(quantization: str) -> None:
    """Each gets the rows that it gets alone, to the last bit in int8; a bad one among them fails alone."""
    computer = make_computer(quantization=quantization)
    frames = [make_frame(5, (0, 4)), make_frame(3, (1, 4)), make_frame(1, (4,)), make_frame(2, ())]
    if quantization == "int8":
        frames = [
            replace(each, rows=rows, scales=scales) for each in frames for rows, scales in [quantize_rows(each.rows)]
        ]
    calls = [encode_call(frame, number) for number, frame in enumerate(frames)]
    alone = [compute(computer, call)[0] for call in calls]
    bad = make_call()
    bad.rows.shape[0] = 6
    *together, failed = computer.compute([make_job(each) for each in [*calls, bad]])
    assert isinstance(failed, WireError)
    for found, expected, frame in zip(together, alone, frames, strict=True):
        assert isinstance(found, Computed)
        assert len(found.rows) == frame.indices.numel()
        same = torch.equal if quantization == "int8" else partial(torch.allclose, atol=1e-6)
        assert same(found.rows, expected)


def test_a_worker_that_was_stopped_for_hours_still_answers() -> None:
    """Its times are more than messages and packets can say."""
    job = make_job(make_call())
    job.received -= 3 * 3600
    (outcome,) = make_computer().compute([job])
    assert isinstance(outcome, Computed)
    assert outcome.queue_us == LONGEST_US
    assert encode_result(outcome.rows, outcome.queue_us, outcome.compute_us).queue_us == LONGEST_US
    assert unpack_result(memoryview(pack_result(1, outcome.queue_us, outcome.compute_us)))[1] == LONGEST_US


def test_a_device_gets_the_next_call_before_the_first_one_is_waited_for() -> None:
    async def body(executor: Executor, gate: Gate) -> None:
        answers = [submit(executor, numbered(number)) for number in (1, 2, 3)]
        gate.opened.set()
        assert [await outcome(answer) for answer in answers] == ["1", "2", "3"]

    computer = Overlapped()
    run(body, gate=computer)
    assert computer.order == ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3"]
