"""Calls from the host, computed on a device: the CPU's bits, whatever is cut, overlapped, or out of memory."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.errors import ConfigError, ConsiliumError, NotReady, Overloaded
from consilium.experts import ExpertWeights
from consilium.frames import Frame, encode_call
from consilium.gpu.experts import compute, form_of
from consilium.gpu.tiling import Batch, Tilings
from consilium.gpu.upload import Uploader
from consilium.quantization import quantize_rows
from expert_service import cuda_device, device_arithmetic, lane, speed
from expert_service.call_queue import Job
from expert_service.calls import Computed, MessageCall
from expert_service.cuda_device import CudaDevice
from expert_service.device_arithmetic import DeviceArithmetic
from expert_service.device_proof import prove
from expert_service.frame_computer import FrameComputer
from expert_service.holdings import Holdings
from expert_service.sources import PlacedWeights
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2
from tests.gpu.test_experts import SMALL, expert
from tests.unit.model_configs import tiny_config

HIDDEN, SIZE, EXPERTS = 72, 40, 4
HOST = find_arithmetic("int8", "bfloat16", HIDDEN, SIZE)
HELD = [HOST.prepare(expert(number, HIDDEN, SIZE)) for number in range(EXPERTS)]
FORM = form_of(HELD[0], torch.int8, torch.bfloat16)
TILINGS: Tilings = [(Batch(4, 4), SMALL)]


@pytest.fixture
def placed(device: torch.device) -> list[ExpertWeights]:
    uploader = Uploader(device)
    return [uploader.upload(weights) for weights in HELD]


@pytest.fixture
def arithmetic(device: torch.device) -> DeviceArithmetic:
    return DeviceArithmetic(HOST, FORM, TILINGS, device, HOST.numerics_class)


def make_frame(rows: int, seed: int = 0) -> Frame:
    """Every expert but the second one has some of the rows."""
    generator = torch.Generator().manual_seed(seed)
    values, scales = quantize_rows(torch.randn(rows, HIDDEN, generator=generator))
    chosen = [torch.randperm(rows, generator=generator)[: rows - number].int() for number in (0, rows, 1, 2)]
    offsets = [0, *torch.tensor([len(each) for each in chosen]).cumsum(0).tolist()]
    return Frame(0, values, scales, list(range(EXPERTS)), offsets, torch.cat(chosen))


def expected(frame: Frame) -> Tensor:
    return HOST.compute(HELD, frame.offsets, frame.rows, frame.scales, None, frame.indices)


def test_an_uploaded_expert_is_the_same_in_one_block(placed: list[ExpertWeights]) -> None:
    for own, there in zip(HELD, placed, strict=True):
        assert there.content_hash() == own.content_hash()
        assert there.nbytes() == own.nbytes()
        assert len({tensor.untyped_storage().data_ptr() for tensor in there.tensors()}) == 1
    first = placed[0].content_hash()
    del placed[1:]
    assert placed[0].content_hash() == first  # what was staged for it is overwritten by now


def test_pieces_that_overlap(
    arithmetic: DeviceArithmetic, placed: list[ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of several pieces; then one without ``indices``, into rows of its own; then the lanes once more."""
    monkeypatch.setattr(device_arithmetic, "PIECE", 9)
    frame = make_frame(11)
    found = arithmetic.compute(placed, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert torch.equal(found, expected(frame))
    assert frame.scales is not None
    index = frame.indices.long()
    plain = arithmetic.compute(placed, frame.offsets, frame.rows[index], frame.scales[index])
    assert torch.equal(plain, found)
    assert arithmetic.device_seconds > 0


def test_jobs_are_computed_together(arithmetic: DeviceArithmetic, placed: list[ExpertWeights]) -> None:
    store = ExpertStore([0])
    for number, weights in enumerate(placed):
        store.add(0, number, weights)
    computer = FrameComputer(store, arithmetic, HIDDEN, 64, 2**20)
    frames = [make_frame(3), make_frame(5, seed=1)]
    jobs = [Job(MessageCall(encode_call(frame, 1)), 0, lambda _: None) for frame in frames]
    for frame, outcome in zip(frames, computer.compute(jobs), strict=True):
        assert isinstance(outcome, Computed)
        assert torch.equal(outcome.rows, expected(frame))


def test_frames_that_are_begun_before_others_are_finished(
    arithmetic: DeviceArithmetic, placed: list[ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is too large for a lane of its own while others are under way."""
    monkeypatch.setattr(device_arithmetic, "PIECE", 14)
    frames = [make_frame(3), make_frame(4, seed=1), make_frame(8, seed=2)]
    outs = [torch.empty(len(frame.indices), HIDDEN, dtype=torch.bfloat16) for frame in frames]
    ends = [
        arithmetic.begin(placed, frame.offsets, frame.rows, frame.scales, out, frame.indices)
        for frame, out in zip(frames, outs, strict=True)
    ]
    for frame, out, end in zip(frames, outs, ends, strict=True):
        end()
        assert torch.equal(out, expected(frame))


class Memory:
    """A device on which no more than ``pairs`` find memory at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
        self.pairs, self.refused = pairs, 0
        monkeypatch.setattr(lane, "compute", self._compute)

    def _compute(self, *given: Any) -> None:
        if len(given[3].source) > self.pairs:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        compute(*given)


def test_a_batch_that_finds_no_memory_is_halved(
    arithmetic: DeviceArithmetic, placed: list[ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_arithmetic, "PIECE", 12)
    memory, frame = Memory(monkeypatch, 7), make_frame(6)
    found = arithmetic.compute(placed, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert torch.equal(found, expected(frame))
    assert memory.refused


def test_without_memory_for_one_row_a_call_is_shed_and_the_next_one_is_computed(
    arithmetic: DeviceArithmetic, placed: list[ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, frame = Memory(monkeypatch, 0), make_frame(3)
    with pytest.raises(Overloaded, match="out of memory") as caught:
        arithmetic.compute(placed, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert caught.value.retryable
    memory.pairs = 100
    found = arithmetic.compute(placed, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert torch.equal(found, expected(frame))


def test_a_gpu_that_fails_makes_its_worker_leave(
    arithmetic: DeviceArithmetic, placed: list[ExpertWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    told = list[tuple[int, int]]()
    monkeypatch.setattr(lane, "compute", fail)
    monkeypatch.setattr(os, "kill", lambda *given: told.append(given))
    frame = make_frame(2)
    with pytest.raises(NotReady, match="ask another one") as caught:
        arithmetic.compute(placed, frame.offsets, frame.rows, frame.scales, None, frame.indices)
    assert caught.value.retryable
    assert told == [(os.getpid(), signal.SIGTERM)]


class _Source:
    def load(self, layer: int, expert: int) -> tuple[ExpertWeights, bytes]:
        assert layer == 0
        return HELD[expert], HELD[expert].content_hash()


def make_device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setattr(cuda_device, "tilings_for", lambda *_: TILINGS)
    return CudaDevice(HOST, tiny_config(hidden_size=HIDDEN, expert_size=SIZE))


def test_an_expert_that_finds_no_memory_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    device, store = make_device(monkeypatch), ExpertStore([0])
    holdings = Holdings(PlacedWeights(_Source(), device.place), store, expert_pb2.DescribeResponse())
    holdings.load((0, 1))
    with monkeypatch.context() as patched:
        patched.setattr(Uploader, "upload", _out_of_memory)
        with pytest.raises(Overloaded, match=r"no memory for one more expert on .*; let this worker hold fewer"):
            holdings.load((0, 2))
    assert holdings.held() == {(0, 1)}
    holdings.load((0, 2))
    holdings.drop((0, 1))
    assert store.nbytes == HELD[2].nbytes()


def test_how_fast_it_is_while_others_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes belong to one thread; what is measured has its own."""
    monkeypatch.setattr(speed, "ROWS", 3)
    monkeypatch.setattr(speed, "REPEATS", 1)
    device = make_device(monkeypatch)
    arithmetic, experts = device.samples(HELD[0])
    assert arithmetic is not device.arithmetic
    assert all(0 < nanoseconds < 10**10 for nanoseconds in speed.measure(arithmetic, experts, HIDDEN))
    assert device.busy_seconds == 0


def _out_of_memory(*_: object) -> ExpertWeights:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_kernels_that_are_wrong_are_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one bit of one row."""

    def spoil(*given: Any) -> None:
        compute(*given)
        last = given[-1][-1, -1]
        given[-1][-1, -1] = last.nextafter(last.new_tensor(torch.inf))

    uploader = Uploader(device)
    prove(HOST, FORM, TILINGS, device, uploader.upload)
    monkeypatch.setattr(lane, "compute", spoil)
    with pytest.raises(ConsiliumError, match=r"the device computes 1 rows wrong .*--device cpu"):
        prove(HOST, FORM, TILINGS, device, uploader.upload)


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"worker\.device: cuda, but torch sees no GPU"):
        CudaDevice(HOST, tiny_config(hidden_size=HIDDEN, expert_size=SIZE))
