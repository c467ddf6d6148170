"""A worker whose experts are on a device, as a process: what it says of itself, and the rows that it answers with."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import httpx
import pytest
import torch

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.experts import ExpertWeights
from consilium.frames import encode_call
from consilium.gpu.experts import form_of
from consilium.gpu.tiling import Batch
from consilium.gpu.tuned import keep
from consilium.models import cache_folder, resolve_model
from expert_service.sources import read_weights
from protos.expert.v1 import expert_pb2, expert_pb2_grpc
from tests.gpu.test_experts import SMALL
from tests.integration.grpc_client import connected, conversation, make_frame, quantized, rows_of
from tests.stack import Process, running, worker_argv

MODEL, LAYER, EXPERTS = "shape:tiny", 1, (0, 2, 3)
CHECKPOINT = Checkpoint(resolve_model(MODEL))
HIDDEN = CHECKPOINT.config.hidden_size
ARITHMETIC = find_arithmetic("int8", "bfloat16", HIDDEN, CHECKPOINT.config.expert_size)


def weights_of(expert: int) -> ExpertWeights:
    return ARITHMETIC.prepare(CHECKPOINT.expert(LAYER, expert))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Iterator[Process]:
    """With one tiling: the interpreter takes its time to prove each."""
    flags = ("--model", MODEL, "--dtype", "bfloat16", "--device", "cuda", "--metrics-port", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSILIUM_KERNELS", str(cache_folder() / "kernels"))
        patch.setenv("CONSILIUM_CACHE", str(tmp_path_factory.mktemp("cache")))
        keep(form_of(weights_of(0), torch.int8, torch.bfloat16), device, [(Batch(4, 4), SMALL)])
        with running(worker_argv("0-3", *flags)) as process:
            yield process


def stub_of(channel: grpc.Channel) -> expert_pb2_grpc.ExpertServiceStub:
    return expert_pb2_grpc.ExpertServiceStub(channel)


def test_it_says_what_it_is(worker: Process) -> None:
    with connected(worker.address) as channel:
        said = stub_of(channel).Describe(expert_pb2.DescribeRequest(), timeout=10)
    assert (said.device, said.numerics_class) == ("cuda", ARITHMETIC.numerics_class)
    held = next(each for each in said.layers if each.layer == LAYER)
    assert list(held.hashes) == [weights_of(expert).content_hash() for expert in range(4)]


def test_its_rows_have_the_bits_of_the_cpu(worker: Process) -> None:
    frame = quantized(make_frame(HIDDEN, LAYER, list(EXPERTS), 7))
    with conversation(worker.address) as stream:
        response = stream.ask(encode_call(frame, 1))
    assert frame.scales is not None
    experts = [weights_of(expert) for expert in EXPERTS]
    expected = ARITHMETIC.compute(experts, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert torch.equal(rows_of(response.result, frame, torch.bfloat16), expected)
    text = httpx.get(worker.metrics).raise_for_status().text
    busy = next(line for line in text.splitlines() if line.startswith("consilium_expert_service_device_busy_seconds"))
    assert float(busy.split()[-1]) > 0


def test_peers_get_the_weights_from_the_device(worker: Process) -> None:
    request = expert_pb2.FetchWeightsRequest(layer=LAYER, expert=2)
    with connected(worker.address) as channel:
        parts = [message.data for message in stub_of(channel).FetchWeights(request, timeout=10)]
    found = read_weights(weights_of(0), parts)
    assert found is not None
    assert found.content_hash() == weights_of(2).content_hash()
