"""The expert service over real gRPC: what it says about itself, what it computes, and what it makes of bad calls."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from consilium.arithmetics import find_arithmetic
from consilium.attachment import Parts, unpack
from consilium.checkpoint import Checkpoint
from consilium.frames import decode_result, encode_call
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from protos.tensor.v1 import tensor_pb2
from tests.integration.grpc_client import Conversation, connected, conversation, make_frame, quantized, rows_of
from tests.local_workers import reference_rows
from tests.stack import Process, running, worker_argv

HIDDEN = 64
Call = expert_pb2.Call


def good_call(call_id: int = 1, rows: int = 3, layer: int = 1) -> Call:
    return encode_call(make_frame(HIDDEN, layer, [0, 3], rows), call_id)


def test_describe(float_worker: Process, int8_worker: Process, tiny_mixtral: Path) -> None:
    checkpoint = Checkpoint(tiny_mixtral)
    found = []
    for worker in (float_worker, int8_worker):
        with connected(worker.address) as channel:
            stub = expert_pb2_grpc.ExpertServiceStub(channel)
            found.append(stub.Describe(expert_pb2.DescribeRequest(), timeout=10))
    exact, int8 = found
    assert (exact.protocol_version, exact.group, exact.device) == (4, "experts", "cpu")
    assert exact.model == "tiny"
    assert exact.model_fingerprint == int8.model_fingerprint == checkpoint.fingerprint
    assert exact.worker_id != int8.worker_id
    assert (exact.quantization, exact.row_dtype) == ("none", tensor_pb2.DTYPE_FLOAT32)
    assert (int8.quantization, int8.row_dtype) == ("int8", tensor_pb2.DTYPE_BFLOAT16)
    assert int8.numerics_class == "int8/v1"
    assert exact.numerics_class.startswith("float32/cpu/")
    assert (exact.hidden_size, exact.max_batch) == (HIDDEN, 4096)
    assert [(each.layer, list(each.experts)) for each in exact.layers] == [(layer, [0, 1, 3]) for layer in range(3)]
    assert [list(each.experts) for each in int8.layers] == [[0, 1, 2, 3]] * 3
    arithmetic = find_arithmetic("none", "float32", HIDDEN, 48)
    assert exact.layers[2].hashes[1] == arithmetic.prepare(checkpoint.expert(2, 1)).content_hash()
    hashes = [each for worker in found for layer in worker.layers for each in layer.hashes]
    assert len(set(hashes)) == len(hashes) == 9 + 12


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_forward_computes_what_the_checkpoint_says(float_worker: Process, tiny_mixtral: Path, rows: int) -> None:
    frame = make_frame(HIDDEN, 2, [0, 1, 3], rows)
    with conversation(float_worker.address) as stream:
        response = stream.ask(encode_call(frame, 7))
    expected = reference_rows(Checkpoint(tiny_mixtral), frame)
    assert torch.allclose(rows_of(response.result, frame), expected, rtol=1e-4, atol=1e-5)
    assert response.result.compute_us > 0


def test_forward_in_int8_is_bit_for_bit_the_definition(int8_worker: Process, tiny_mixtral: Path) -> None:
    frame = quantized(make_frame(HIDDEN, 0, [0, 2, 3], 6))
    with conversation(int8_worker.address) as stream:
        response = stream.ask(encode_call(frame, 1))
    arithmetic = find_arithmetic("int8", "bfloat16", HIDDEN, 48)
    weights = [arithmetic.prepare(Checkpoint(tiny_mixtral).expert(0, expert)) for expert in (0, 2, 3)]
    assert frame.scales is not None
    expected = arithmetic.compute(weights, frame.offsets, frame.rows[frame.indices], frame.scales[frame.indices])
    assert torch.equal(rows_of(response.result, frame, torch.bfloat16), expected)


def test_forward_once(float_worker: Process, tiny_mixtral: Path) -> None:
    frame = make_frame(HIDDEN, 1, [1], 4)
    with connected(float_worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        response = stub.ForwardOnce(expert_pb2.ForwardOnceRequest(call=encode_call(frame, 0)), timeout=10)
    expected = reference_rows(Checkpoint(tiny_mixtral), frame)
    assert torch.allclose(rows_of(response.result, frame), expected, rtol=1e-4, atol=1e-5)


def test_many_calls_at_once_on_several_streams(float_worker: Process, tiny_mixtral: Path) -> None:
    frames = {number: make_frame(HIDDEN, number % 3, [0, 1, 3], 1 + number % 9) for number in range(60)}
    with connected(float_worker.address) as channel:
        streams = [Conversation(channel) for _ in range(3)]
        for number, frame in frames.items():
            streams[number % 3].send(encode_call(frame, number))
        answers: dict[int, expert_pb2.ForwardResponse] = {}
        for stream in streams:
            stream.finish()
            answers |= {response.call_id: response for response in stream.receive_all()}
    assert answers.keys() == frames.keys()
    checkpoint = Checkpoint(tiny_mixtral)
    for number, frame in frames.items():
        rows = rows_of(answers[number].result, frame)
        assert torch.allclose(rows, reference_rows(checkpoint, frame), rtol=1e-4, atol=1e-5)


def changed(change: Callable[[Call], object]) -> Call:
    call = good_call(call_id=5)
    change(call)
    return call


def set_offsets(*offsets: int) -> Callable[[Call], object]:
    def change(call: Call) -> None:
        del call.offsets[:]
        call.offsets.extend(offsets)

    return change


def set_experts(*experts: int) -> Callable[[Call], object]:
    def change(call: Call) -> None:
        del call.experts[:]
        call.experts.extend(experts)

    return change


def set_indices(*indices: int) -> Callable[[Call], object]:
    def change(call: Call) -> None:
        call.indices.data = struct.pack(f"<{len(indices)}i", *indices)

    return change


def set_shape(*shape: int) -> Callable[[Call], object]:
    def change(call: Call) -> None:
        del call.rows.shape[:]
        call.rows.shape.extend(shape)

    return change


BAD_CALLS: dict[str, tuple[Callable[[Call], object], str, str]] = {
    "nothing in it": (lambda call: call.CopyFrom(Call(call_id=5)), "DATA_LOSS", "rows: expected"),
    "wrong dtype": (lambda call: setattr(call.rows, "dtype", 2), "DATA_LOSS", "rows: expected torch.float32"),
    "unknown dtype": (lambda call: setattr(call.rows, "dtype", 99), "DATA_LOSS", "rows: expected torch.float32"),
    "indices of another dtype": (lambda call: setattr(call.indices, "dtype", 1), "DATA_LOSS", "indices: expected"),
    "wrong hidden size": (set_shape(4, 48), "DATA_LOSS", "rows: expected shape [any, 64]"),
    "one dimension": (set_shape(192), "DATA_LOSS", "rows: expected shape [any, 64]"),
    "a huge shape": (set_shape(2**32 - 1, 64), "DATA_LOSS", "bytes, found 768"),
    "truncated data": (lambda call: setattr(call.rows, "data", call.rows.data[:-1]), "DATA_LOSS", "768 bytes"),
    "too much data": (lambda call: setattr(call.rows, "data", call.rows.data * 2), "DATA_LOSS", "768 bytes"),
    "no indices": (lambda call: call.ClearField("indices"), "DATA_LOSS", "indices: expected"),
    "scales with floats": (lambda call: call.scales.CopyFrom(call.rows), "DATA_LOSS", "scales: not expected"),
    "offsets missing": (set_offsets(), "DATA_LOSS", "offsets: expected 3 entries"),
    "offsets too short": (set_offsets(0, 6), "DATA_LOSS", "offsets: expected 3 entries"),
    "offsets that fall": (set_offsets(0, 7, 6), "DATA_LOSS", "offsets: must not fall"),
    "offsets past the end": (set_offsets(0, 3, 2**32 - 1), "DATA_LOSS", "offsets: expected 3 entries"),
    "offsets not from zero": (set_offsets(1, 3, 6), "DATA_LOSS", "offsets: expected 3 entries"),
    "index out of range": (set_indices(0, 1, 2, 0, 1, 3), "DATA_LOSS", "indices: must lie in 0..2"),
    "negative index": (set_indices(0, -1, 2, 0, 1, 2), "DATA_LOSS", "indices: must lie in 0..2"),
    "experts not ascending": (set_experts(3, 0), "DATA_LOSS", "experts: must be ascending"),
    "an expert twice": (set_experts(3, 3), "DATA_LOSS", "experts: must be ascending"),
    "an expert of another worker": (set_experts(0, 2), "FAILED_PRECONDITION", "experts 2 of layer 1"),
    "an expert nobody has": (set_experts(0, 2**32 - 1), "FAILED_PRECONDITION", "experts 4294967295 of layer 1"),
    "an unknown layer": (lambda call: setattr(call, "layer", 3), "FAILED_PRECONDITION", "layer 3 is not on"),
    "another weight version": (
        lambda call: setattr(call, "weight_version", "v2"),
        "FAILED_PRECONDITION",
        "weight version 'v2'",
    ),
}


@pytest.mark.parametrize(("change", "code", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_call_is_answered_and_the_stream_goes_on(
    float_worker: Process, change: Callable[[Call], object], code: str, message: str
) -> None:
    with conversation(float_worker.address) as stream:
        stream.send(good_call(4), changed(change), good_call(6))
        answers = {response.call_id: response for response in (stream.receive() for _ in range(3))}
    assert answers[5].error.code == code
    assert message in answers[5].error.message
    assert answers[5].error.retryable
    assert answers[4].result.rows == answers[6].result.rows


@pytest.mark.parametrize(("change", "code", "message"), list(BAD_CALLS.values())[::6], ids=list(BAD_CALLS)[::6])
def test_a_bad_call_without_a_stream_has_a_status(
    float_worker: Process, change: Callable[[Call], object], code: str, message: str
) -> None:
    with connected(float_worker.address) as channel:
        stub = expert_pb2_grpc.ExpertServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ForwardOnce(expert_pb2.ForwardOnceRequest(call=changed(change)), timeout=10)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code().name == code
        assert message in str(caught.value.details())


def test_int8_calls_need_their_scales(int8_worker: Process) -> None:
    frame = quantized(make_frame(HIDDEN, 0, [0], 4))
    call = encode_call(frame, 1)
    call.ClearField("scales")
    short = encode_call(frame, 2)
    short.scales.shape[0] = 3
    floats = encode_call(make_frame(HIDDEN, 0, [0], 4), 3)
    with conversation(int8_worker.address) as stream:
        messages = [stream.ask(bad).error.message for bad in (call, short, floats)]
        assert stream.ask(encode_call(frame, 4)).HasField("result")
    assert [message.split(":")[0] for message in messages] == ["scales", "scales", "rows"]


def test_rows_that_are_not_finite_harm_no_other(int8_worker: Process) -> None:
    frame = quantized(make_frame(HIDDEN, 0, [0], 4))
    with conversation(int8_worker.address) as stream:
        clean = rows_of(stream.ask(encode_call(frame, 1)).result, frame, torch.bfloat16)
        assert frame.scales is not None
        frame.scales[3] = torch.nan  # computed first: the indices fall
        frame.scales[2] = torch.inf
        found = rows_of(stream.ask(encode_call(frame, 2)).result, frame, torch.bfloat16)
    assert found[:2].isnan().all()
    assert torch.equal(found[2:], clean[2:])


def test_requests_that_are_neither_call_nor_cancel(float_worker: Process) -> None:
    with conversation(float_worker.address) as stream:
        stream.send_request(expert_pb2.ForwardRequest())
        assert stream.receive().error.code == "INVALID_ARGUMENT"
        stream.cancel(12345)  # never sent
        assert stream.ask(good_call(9)).HasField("result")
        stream.finish()
        assert stream.receive_all() == []


def test_bytes_that_are_no_message_end_only_their_own_stream(float_worker: Process) -> None:
    with connected(float_worker.address) as channel, conversation(float_worker.address) as other:
        forward: Any = channel.stream_stream("/expert.v1.ExpertService/Forward")
        with pytest.raises(grpc.RpcError) as caught:
            list(forward(iter([b"\xff\xff\xff"]), timeout=10))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert other.ask(good_call()).HasField("result")


def attached(call_id: int = 1) -> tuple[bytes, expert_pb2.ForwardRequest]:
    """A call with its tensors attached: as it travels, and as protobuf reads it."""
    parts = Parts()
    request = expert_pb2.ForwardRequest(call=encode_call(make_frame(HIDDEN, 1, [0, 3], 3), call_id, 0, parts.place))
    packed = parts.pack(request)
    return packed, expert_pb2.ForwardRequest.FromString(packed)


def test_an_attached_call_is_answered_alike(float_worker: Process) -> None:
    frame = make_frame(HIDDEN, 1, [0, 3], 3)
    with conversation(float_worker.address) as stream:
        expected = rows_of(stream.ask(good_call()).result, frame)
        stream.send_request(attached(2)[1])
        response, attachment = unpack(expert_pb2.ForwardResponse, stream.receive().SerializeToString())
    assert response.result.rows.HasField("offset")
    found = decode_result(response.result, frame.indices.numel(), HIDDEN, torch.float32, attachment)
    assert torch.equal(found, expected)


def test_attachments_that_lie_are_answered_and_the_stream_goes_on(float_worker: Process) -> None:
    with conversation(float_worker.address) as stream:
        for field in ("rows", "indices"):
            for offset in (10**6, 2**64 - 1):
                request = attached()[1]
                getattr(request.call, field).offset = offset
                stream.send_request(request)
                assert f"{field}: " in stream.receive().error.message
        for size in (0, 1, 700):
            request = attached()[1]
            request.attachment = request.attachment[:size]
            stream.send_request(request)
            error = stream.receive().error
            assert (error.code, error.retryable) == ("DATA_LOSS", True)
        request = attached()[1]
        request.call.rows.shape[0] = 2**32 - 1
        stream.send_request(request)
        assert "rows: " in stream.receive().error.message
        assert stream.ask(good_call(9)).HasField("result")


def test_an_attached_call_that_is_cut_off_ends_only_its_own_stream(float_worker: Process) -> None:
    packed, _ = attached()
    with connected(float_worker.address) as channel, conversation(float_worker.address) as other:
        forward: Any = channel.stream_stream("/expert.v1.ExpertService/Forward")
        for size in (len(packed) - 1, len(packed) // 2, 3):
            with pytest.raises(grpc.RpcError) as caught:
                list(forward(iter([packed[:size]]), timeout=10))
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert other.ask(good_call()).HasField("result")


@pytest.fixture(scope="module")
def narrow_worker(tiny_mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Frames of at most 64 KiB, compute batches of at most 5 rows, in a group of its own."""
    config = tmp_path_factory.mktemp("narrow") / "consilium.yaml"
    config.write_text(
        "experts: {narrow: {endpoint: 'grpc://127.0.0.1:1', max_batch: 5}}\n"
        f"model: {tiny_mixtral}\nquantization: none\nworker: {{group: narrow, layers: 1-2, max_frame: 64KiB}}\n"
    )
    with running(worker_argv("all", "--config", str(config))) as process:
        yield process


def test_a_worker_configured_by_file(narrow_worker: Process) -> None:
    with connected(narrow_worker.address) as channel:
        found = expert_pb2_grpc.ExpertServiceStub(channel).Describe(expert_pb2.DescribeRequest(), timeout=10)
    assert (found.group, found.max_batch, [each.layer for each in found.layers]) == ("narrow", 5, [1, 2])


def test_a_frame_is_split_into_compute_batches(narrow_worker: Process, float_worker: Process) -> None:
    frame = make_frame(HIDDEN, 1, [0, 1, 3], 13)
    found = []
    for worker in (narrow_worker, float_worker):
        with conversation(worker.address) as stream:
            found.append(rows_of(stream.ask(encode_call(frame, 1)).result, frame))
    assert torch.equal(*found)


def test_a_frame_over_the_limit_is_answered_and_the_stream_goes_on(narrow_worker: Process) -> None:
    many_results = encode_call(make_frame(HIDDEN, 1, [0, 1, 2, 3], 100), 2)
    with conversation(narrow_worker.address) as stream:
        for call, what in ((good_call(1, rows=300), "the call takes"), (many_results, "the result of 400 rows")):
            error = stream.ask(call).error
            assert (error.code, error.retryable) == ("INVALID_ARGUMENT", False)
            assert what in error.message
            assert "64KiB" in error.message
        request = attached(4)[1]
        request.attachment += bytes(70_000)  # which no tensor has
        stream.send_request(request)
        assert "the call takes 7" in stream.receive().error.message
        assert stream.ask(good_call(3)).HasField("result")


def test_a_frame_over_grpcs_own_limit_ends_only_its_stream(narrow_worker: Process) -> None:
    with conversation(narrow_worker.address) as stream, conversation(narrow_worker.address) as other:
        stream.send(good_call(1, rows=600))
        with pytest.raises(grpc.RpcError) as caught:
            stream.receive()
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert other.ask(good_call(2)).HasField("result")


def test_answers_nobody_reads_stop_the_reading_of_calls_but_lose_none(narrow_worker: Process) -> None:
    count = 200  # 200 results of 30 KiB: far more than the worker lets wait
    with conversation(narrow_worker.address) as stream:
        stream.send(*(encode_call(make_frame(HIDDEN, 1, [0, 1], 60), number) for number in range(count)))
        stream.finish()
        answers = stream.receive_all()
    assert sorted(response.call_id for response in answers) == list(range(count))
    overloaded = [response for response in answers if response.HasField("error")]
    assert {response.error.code for response in overloaded} <= {"RESOURCE_EXHAUSTED"}
    assert all(response.error.retryable for response in overloaded)
    assert len(overloaded) < count


def test_health(float_worker: Process) -> None:
    with connected(float_worker.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "expert.v1.ExpertService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection(float_worker: Process) -> None:
    with connected(float_worker.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "expert.v1.ExpertService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        service = DescriptorPool(database).FindServiceByName("expert.v1.ExpertService")
    assert [method.name for method in service.methods] == ["Describe", "Forward", "ForwardOnce", "FetchWeights"]
    assert "weight_version" in service.methods_by_name["Describe"].output_type.fields_by_name
