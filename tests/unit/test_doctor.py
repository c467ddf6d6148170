"""The doctor's words follow from its figures; workers that do not belong together are named with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from consilium.frames import PROTOCOL_VERSION
from gateway.doctor.devices import explain_devices
from gateway.doctor.fit import find_misfits
from gateway.doctor.verdict import Split, Timing, explain, layer_time
from protos.expert.v1 import expert_pb2
from protos.tensor.v1 import tensor_pb2

SPLIT = Split(layers=30, experts=8, top_k=2, workers=2, sent_bytes=1000, returned_bytes=2000)
MEMORY_BOUND = Timing(round_trip=0.0002, seconds_per_byte=0.0, few=0.001, many=0.004)


def test_one_token_is_shared_by_the_workers() -> None:
    time = layer_time([MEMORY_BOUND] * 2, SPLIT, 1)
    assert (time.way, time.experts, time.together) == pytest.approx((0.0002, 0.001, 0.002))
    assert time.gain == pytest.approx(0.002 / 0.0012)
    assert time.hop_share == pytest.approx(1 / 6)


def test_the_slowest_worker_and_the_bytes_count() -> None:
    slow = Timing(round_trip=0.0001, seconds_per_byte=1e-6, few=0.002, many=0.004)
    time = layer_time([MEMORY_BOUND, slow], SPLIT, 1)
    assert time.experts == pytest.approx(0.002)
    assert time.way == pytest.approx(0.0001 + (1000 + 2000) * 1e-6)  # one row out, one of two rows back


def test_many_tokens_use_all_the_experts() -> None:
    time = layer_time([MEMORY_BOUND] * 2, SPLIT, 1000)
    assert time.together == pytest.approx(8 * MEMORY_BOUND.expert_seconds(2000 / 8))
    assert time.experts == pytest.approx(time.together / 2)


def test_words_where_splitting_pays_and_memory_limits() -> None:
    text = " ".join(explain([MEMORY_BOUND] * 2, SPLIT))
    assert "A token passes 30 layers with experts." in text
    assert "With 1 token in a step a layer waits 0.20 ms for the way and 1.00 ms for the experts: the way is 17 %" in (
        text.replace("17%", "17 %")
    )
    assert "those on one machine share its memory and cores" in text
    assert "28 tokens a second is the most" in text
    assert "Splitting over 2 workers pays there: all the experts in one process would take 2.00 ms, 1.7 times" in text
    assert "Reading the weights limits (32 rows of an expert take 4.0 times as long as one)" in text


def test_words_where_the_way_is_long() -> None:
    text = " ".join(explain([Timing(0.01, 0.0, 0.001, 0.004)] * 2, SPLIT))
    assert "Splitting over 2 workers does not pay in speed there: all the experts in one process" in text
    assert "At one token the way limits" in text


def test_words_where_arithmetic_limits() -> None:
    assert (
        "Arithmetic limits (32 rows of an expert take 20.0 times"
        in explain([Timing(1e-5, 0.0, 0.001, 0.02)], SPLIT)[-1]
    )


def test_words_of_a_single_worker() -> None:
    text = " ".join(explain([MEMORY_BOUND], Split(1, 8, 2, 1, 1000, 2000)))
    assert "A token passes 1 layer with experts." in text
    assert "One worker holds all the experts" in text
    assert "Splitting" not in text


def described(experts: Iterable[int] = (0, 1), **fields: Any) -> expert_pb2.DescribeResponse:
    held = list(experts)
    layer = expert_pb2.LayerExperts(layer=0, experts=held, hashes=[bytes([each]) * 16 for each in held])
    fits: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "model_fingerprint": "f" * 64,
        "quantization": "int8",
        "row_dtype": tensor_pb2.DTYPE_FLOAT32,
        "hidden_size": 64,
        "layers": [layer],
    }
    return expert_pb2.DescribeResponse(**{**fits, **fields})


def test_workers_that_fit() -> None:
    assert find_misfits({}, None) == {}
    assert find_misfits({"a:1": described(), "b:1": described([1, 2])}, "f" * 64) == {}


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (described(protocol_version=PROTOCOL_VERSION + 1), "protocol version"),
        (described(model_fingerprint="e" * 64), "model fingerprint is eeee"),
        (described(quantization="none"), "quantization is none where int8"),
        (described(row_dtype=tensor_pb2.DTYPE_BFLOAT16), "dtype is torch.bfloat16"),
        (described(hidden_size=65), "hidden size is 65 where 64"),
        (described(layers=[expert_pb2.LayerExperts(layer=0, experts=[1], hashes=[b"x" * 16])]), "weights of expert 1"),
    ],
)
def test_a_worker_that_does_not_fit(odd: expert_pb2.DescribeResponse, reason: str) -> None:
    misfits = find_misfits({"a:1": described(), "b:1": odd}, None)
    assert list(misfits) == ["b:1"]
    assert reason in misfits["b:1"]


def test_a_worker_of_another_model_than_the_one_named() -> None:
    assert "model fingerprint is ffff" in find_misfits({"a:1": described()}, "0" * 64)["a:1"]


def test_workers_on_gpus_of_this_machine() -> None:
    def on(uuid: str) -> expert_pb2.DescribeResponse:
        return expert_pb2.DescribeResponse(device_uuid=uuid)

    assert explain_devices({"a:1": on("")}, mps=False) == []
    shared = {"a:1": on("GPU-1"), "a:2": on("GPU-1"), "a:3": on("GPU-2"), "a:4": on("")}
    first, *others = explain_devices(shared, mps=False)
    assert "3 workers on 2 GPUs" in first
    assert [each.split(";")[0] for each in others] == ["a:1 and a:2 use GPU-1", "a:3 uses GPU-2"]
    assert all("nvidia-cuda-mps-control -d" in each for each in others)
    assert all("MPS, which is running" in each for each in explain_devices(shared, mps=True)[1:])
