"""A worker that may not have all of its experts in memory: the same rows, within its limit, whatever its files do."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import torch

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.frames import Frame, encode_call
from consilium.units import parse_size
from tests.integration.grpc_client import conversation, make_frame, quantized, rows_of
from tests.memory import resident_bytes
from tests.paged_models import write_paged
from tests.stack import launch, running, worker_argv

HIDDEN, SIZE, EXPERTS = 512, 2048, 16
EXPERT_BYTES = 3 * SIZE * HIDDEN
MARGIN = 12 * EXPERT_BYTES  # so many of 32 more than the fewest; a process does not always take the same itself


def least_limit(model: Path) -> int:
    """What a worker says that it needs at least."""
    worker = launch(worker_argv("all", "--model", str(model), "--memory-limit", "1MiB"))
    assert worker.wait() == 1
    assert worker.popen.stdout is not None
    worker.popen.stdout.close()
    found = re.search(r"error: worker\.memory_limit: 1MiB is too little: .*; give it (\S+) or more", worker.log())
    assert found is not None, worker.log()
    return parse_size(found[1])


def traffic(url: str) -> dict[str, float]:
    text = httpx.get(url).raise_for_status().text
    found = re.findall(r"^consilium_expert_service_memory_(\w+)\{.*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def frame_of(number: int) -> Frame:
    """Three experts of one of the two layers, as steps ask for them, and now and then all of a layer."""
    first = 3 * number % EXPERTS
    experts = range(EXPERTS) if number % 10 == 9 else sorted({first, (first + 5) % EXPERTS, 0})
    return quantized(make_frame(HIDDEN, 1 + number % 2, [*experts], 1 + number % 4))


def test_a_third_in_memory_gives_the_same_rows_and_files_that_break_end_nothing(tmp_path: Path) -> None:
    model = write_paged(tmp_path / "model", SIZE, HIDDEN, EXPERTS)
    frames = [frame_of(number) for number in range(40)]
    checkpoint, arithmetic = Checkpoint(model), find_arithmetic("int8", "bfloat16", HIDDEN, SIZE)
    expected = []
    for frame in frames:
        weights = [arithmetic.prepare(checkpoint.expert(frame.layer, expert)) for expert in frame.experts]
        expected.append(arithmetic.compute(weights, frame.offsets, frame.rows, frame.scales, indices=frame.indices))
    limit = least_limit(model) + MARGIN
    argv = worker_argv("all", "--model", str(model), "--memory-limit", str(limit), "--metrics-port", "0")
    with running(argv) as worker, conversation(worker.address) as stream:
        for number, frame in enumerate(frames):
            rows = rows_of(stream.ask(encode_call(frame, number)).result, frame, torch.bfloat16)
            assert torch.equal(rows, expected[number])
        found = traffic(worker.metrics)
        assert found["evictions_total"] > 0
        assert found["hits_total"] > 0
        assert found["bytes"] <= found["limit_bytes"] < 2 * EXPERTS * EXPERT_BYTES
        assert resident_bytes(worker.pid) < limit
        shard = model / "model-00002-of-00004.safetensors"  # of layer 1
        whole = shard.read_bytes()
        with shard.open("r+b") as file:
            file.truncate(2**12)
        everything = quantized(make_frame(HIDDEN, 1, [*range(EXPERTS)], 1))  # more than fits
        error = stream.ask(encode_call(everything, 100)).error
        assert (error.code, error.retryable) == ("ABORTED", True)
        assert error.message == f"{shard} is shorter than it was; put the checkpoint back and start this worker anew"
        assert error.message in worker.log()
        shard.write_bytes(whole)
        answer = stream.ask(encode_call(frames[0], 101))
        assert torch.equal(rows_of(answer.result, frames[0], torch.bfloat16), expected[0])
        assert traffic(worker.metrics)["failed_reads_total"] > 0
