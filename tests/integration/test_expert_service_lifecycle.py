"""How a worker behaves under load, when callers give up, and when it is told to leave or cannot start."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from consilium.frames import encode_call
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from tests.integration.grpc_client import SECONDS, Conversation, connected, make_frame
from tests.stack import Process, launch, running, worker_argv

HIDDEN = 64
ROWS = 2000  # of the slow model: a good part of a second
SERVING = health_pb2.HealthCheckResponse.ServingStatus.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.ServingStatus.NOT_SERVING


def slow_call(call_id: int, deadline_ms: int = 0) -> expert_pb2.Call:
    return encode_call(make_frame(HIDDEN, 0, [0, 1], ROWS), call_id, deadline_ms)


def quick_call(call_id: int, deadline_ms: int = 0) -> expert_pb2.Call:
    return encode_call(make_frame(HIDDEN, 0, [1], 1), call_id, deadline_ms)


@contextmanager
def slow_worker(model: Path, *arguments: str) -> Iterator[Process]:
    with running(worker_argv("all", "--model", str(model), "--quantization", "none", *arguments)) as process:
        yield process


@pytest.fixture(scope="module")
def worker(slow_model: Path) -> Iterator[Process]:
    with slow_worker(slow_model) as process:
        yield process


def test_calls_are_answered_while_another_is_computed(worker: Process) -> None:
    with connected(worker.address) as channel:
        stream = Conversation(channel)
        stream.send(slow_call(1))
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        assert stub.Describe(expert_pb2.DescribeRequest(), timeout=SECONDS).hidden_size == HIDDEN
        bad = quick_call(2)
        bad.call_id = 1  # in use
        stream.send(bad)
        first, second = stream.receive(), stream.receive()
        assert (first.error.code, "call id 1 is in use" in first.error.message) == ("INVALID_ARGUMENT", True)
        assert second.HasField("result")
        stream.finish()


def test_a_cancelled_call_is_dropped_and_answered(worker: Process) -> None:
    with connected(worker.address) as channel:
        stream = Conversation(channel)
        stream.send(slow_call(1), slow_call(2), quick_call(3))
        stream.cancel(2)
        stream.finish()
        answers = stream.receive_all()
    assert [response.call_id for response in answers] == [1, 2, 3]
    assert answers[1].error.code == "CANCELLED"
    assert all(answers[each].HasField("result") for each in (0, 2))


def test_a_late_call_fails_and_the_others_do_not(worker: Process) -> None:
    with connected(worker.address) as channel:
        stream = Conversation(channel)
        # Of another expert, so that they are not computed together with the slow one.
        slow = encode_call(make_frame(HIDDEN, 0, [0], 2 * ROWS), 1)
        stream.send(slow, quick_call(2, deadline_ms=1), quick_call(3, deadline_ms=60_000))
        answers = {response.call_id: response for response in (stream.receive() for _ in range(3))}
        stream.finish()
    assert (answers[2].error.code, answers[2].error.retryable) == ("DEADLINE_EXCEEDED", True)
    assert answers[1].HasField("result")
    assert answers[3].HasField("result")
    assert answers[3].result.queue_us > 0


def test_a_full_queue_is_an_error_of_the_call(slow_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "consilium.yaml"
    config.write_text("worker: {max_queue: 2}\n")
    with slow_worker(slow_model, "--config", str(config)) as process, connected(process.address) as channel:
        stream = Conversation(channel)
        stream.send(slow_call(1), slow_call(2), quick_call(3))
        answers = {response.call_id: response for response in (stream.receive() for _ in range(3))}
        assert (answers[3].error.code, answers[3].error.retryable) == ("RESOURCE_EXHAUSTED", True)
        assert answers[1].HasField("result")
        assert answers[2].HasField("result")
        assert stream.ask(quick_call(4)).HasField("result")
        stream.finish()


def test_a_caller_that_leaves_frees_its_place(slow_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "consilium.yaml"
    config.write_text("worker: {max_queue: 4}\n")
    with slow_worker(slow_model, "--config", str(config)) as process:
        with connected(process.address) as channel:
            leaving = Conversation(channel)
            leaving.send(*(slow_call(number) for number in range(4)))
            leaving.receive()
            leaving.stream.cancel()
        with connected(process.address) as channel:
            stream = Conversation(channel)
            for number in range(1000):  # refused until the one call being computed is done; the other two are dropped
                if stream.ask(quick_call(number)).HasField("result"):
                    break
            stream.finish()
            assert stream.receive_all() == []


def watch_health(channel: grpc.Channel) -> Iterator[health_pb2.HealthCheckResponse]:
    stream: Iterator[health_pb2.HealthCheckResponse] = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), timeout=SECONDS
    )
    return stream


def test_a_worker_told_to_leave_answers_what_it_has_taken(slow_model: Path) -> None:
    with slow_worker(slow_model) as process, connected(process.address) as channel:
        health = watch_health(channel)
        assert next(health).status == SERVING
        stream = Conversation(channel)
        stream.send(*(slow_call(number) for number in range(1, 5)))
        assert stream.receive().call_id == 1  # the others are taken by now
        process.popen.send_signal(signal.SIGTERM)
        assert next(health).status == NOT_SERVING
        stream.send(quick_call(9))
        answers = {response.call_id: response for response in (stream.receive() for _ in range(4))}
        assert (answers[9].error.code, answers[9].error.retryable) == ("UNAVAILABLE", True)
        assert "draining" in answers[9].error.message
        assert all(answers[number].HasField("result") for number in (2, 3, 4))
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait() == 0


def test_an_idle_worker_leaves_at_once_although_streams_are_open(slow_model: Path) -> None:
    with slow_worker(slow_model, "--quantization", "int8") as process, connected(process.address) as channel:
        health = watch_health(channel)
        stream = Conversation(channel)
        assert stream.ask(quick_call(1)).error.code == "DATA_LOSS"  # floats to an int8 worker; the stream is open
        assert next(health).status == SERVING
        assert process.stop(signal.SIGINT) == 0
        assert "draining took more" not in process.log()


def test_the_drain_time_is_bounded(slow_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "consilium.yaml"
    config.write_text("worker: {drain_timeout: 0}\n")
    with slow_worker(slow_model, "--config", str(config)) as process, connected(process.address) as channel:
        stream = Conversation(channel)
        stream.send(*(slow_call(number) for number in range(50)))
        stream.receive()
        assert process.stop() == 0
        assert "draining took more than worker.drain_timeout" in process.log()
        with pytest.raises(grpc.RpcError):
            stream.receive_all()


def test_a_second_signal_ends_it_at_once(slow_model: Path) -> None:
    with slow_worker(slow_model) as process, connected(process.address) as channel:
        health = watch_health(channel)
        assert next(health).status == SERVING
        stream = Conversation(channel)
        stream.send(*(slow_call(number) for number in range(50)))
        stream.receive()
        process.popen.send_signal(signal.SIGTERM)
        assert next(health).status == NOT_SERVING
        assert process.stop() == 128 + signal.SIGTERM


def test_a_killed_worker_is_a_broken_stream(slow_model: Path) -> None:
    with slow_worker(slow_model) as process, connected(process.address) as channel:
        stream = Conversation(channel)
        stream.send(slow_call(1))
        process.popen.kill()
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait() == -signal.SIGKILL


def test_two_workers_never_share_a_port(tiny_mixtral: Path, float_worker: Process) -> None:
    port = float_worker.address.rpartition(":")[2]
    process = launch(["expert_service", "--model", str(tiny_mixtral), "--port", port])
    assert process.popen.communicate(timeout=SECONDS)[0] == ""
    assert process.wait() == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: the port is taken" in process.log()
    assert "Traceback" not in process.log()


def test_requests_are_read_one_by_one(worker: Process) -> None:
    """A caller that half-closes at once still gets every answer."""
    with connected(worker.address) as channel:
        requests: queue.SimpleQueue[expert_pb2.ForwardRequest | None] = queue.SimpleQueue()
        for number in range(20):
            requests.put(expert_pb2.ForwardRequest(call=quick_call(number)))
        requests.put(None)
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        answers = list(stub.Forward(iter(requests.get, None), timeout=SECONDS))
    assert [response.call_id for response in answers] == list(range(20))
