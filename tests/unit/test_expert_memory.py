"""Experts on disk, and the part of them that is in memory: the same bits, whatever makes way for what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import load_config
from consilium.errors import ConfigError, UnreadableWeights
from consilium.experts import ExpertWeights
from consilium.frames import Frame, encode_call
from consilium.quantization import quantize_rows
from expert_service import limits
from expert_service.call_queue import Job
from expert_service.calls import Computed, MessageCall
from expert_service.expert_memory import AllInMemory, Held, LimitedMemory
from expert_service.frame_computer import FrameComputer
from expert_service.paged_expert import PagedExpert
from expert_service.server import Worker
from expert_service.sources import DiskWeights, LocalWeights, blank_weights
from expert_service.store import load_store
from tests.paged_models import write_paged
from tests.tiny_models import save_mixtral

LAYERS, EXPERTS = (1, 2), 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paged(tmp_path_factory.mktemp("paged") / "model")


class Part:
    """A store with its experts on disk, and one with them mapped."""

    def __init__(self, folder: Path, slots: int) -> None:
        checkpoint = Checkpoint(folder)
        sizes = checkpoint.config.hidden_size, checkpoint.config.expert_size
        arithmetic = find_arithmetic("int8", "bfloat16", *sizes)
        layout = blank_weights(arithmetic, checkpoint.config)
        source = DiskWeights(checkpoint, arithmetic, layout)
        self.hidden_size = sizes[0]
        self.store = load_store(source, LAYERS, range(EXPERTS))
        self.room = max(each.room for each in self.experts(1, range(EXPERTS)))
        self.memory = LimitedMemory(slots, self.room, len(LAYERS))
        self.store.memory = self.memory
        self.computer = FrameComputer(self.store, arithmetic, sizes[0], 16, 2**20, self.memory)
        mapped = load_store(LocalWeights(Checkpoint(folder), arithmetic), LAYERS, range(EXPERTS))
        self.expected = FrameComputer(mapped, arithmetic, sizes[0], 16, 2**20)

    def experts(self, layer: int, experts: Sequence[int]) -> list[PagedExpert]:
        return [each for each in self.store.find(layer, experts) if isinstance(each, PagedExpert)]


def make_frame(seed: int, hidden_size: int) -> Frame:
    """Some rows for some experts, one of which has none."""
    random = torch.Generator().manual_seed(seed)
    rows, scales = quantize_rows(torch.randn(5, hidden_size, generator=random))
    count = 1 + seed % EXPERTS
    experts = sorted(torch.randperm(EXPERTS, generator=random)[:count].tolist())
    sizes = [1, *torch.randint(6, (count - 1,), generator=random).tolist()]
    indices = torch.cat([torch.randperm(5, generator=random)[:size] for size in sizes]).int()
    return Frame(1 + seed % 2, rows, scales, experts, [0, *accumulate(sizes)], indices)


def outcome(computer: FrameComputer, *frames: Frame) -> list[Tensor | Exception]:
    calls = [MessageCall(encode_call(frame, 1)) for frame in frames]
    found = computer.compute([Job(call, 0, lambda _: None) for call in calls])
    return [each.rows if isinstance(each, Computed) else each for each in found]


def assert_same(part: Part, *frames: Frame) -> None:
    for found, expected in zip(outcome(part.computer, *frames), outcome(part.expected, *frames), strict=True):
        assert isinstance(found, Tensor), found
        assert isinstance(expected, Tensor)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16])
def test_the_same_rows_however_few_are_in_memory(model: Path, slots: int) -> None:
    part = Part(model, slots)
    for seed in range(60):
        assert_same(part, make_frame(seed, part.hidden_size))
    assert_same(part, make_frame(1, part.hidden_size), make_frame(3, part.hidden_size))
    traffic = part.memory.traffic
    assert 0 < part.memory.resident <= slots
    assert traffic.hits + traffic.misses > traffic.misses >= traffic.reads - traffic.failed_reads > 0
    assert traffic.evictions == traffic.reads - part.memory.resident
    assert traffic.read_bytes == traffic.reads * part.room
    assert (traffic.evictions == 0) == (slots == 16)


def test_hashes_and_sizes_are_those_of_the_mapped_ones(model: Path) -> None:
    part = Part(model, 2)
    mapped = part.expected._store
    assert (part.store.hashes, part.store.nbytes) == (mapped.hashes, mapped.nbytes)
    (paged,), (plain,) = part.experts(1, [5]), mapped.find(1, [5])
    assert paged.content_hash() == plain.content_hash() == part.store.hashes[1][5]


def test_what_is_computed_with_stays_although_others_are_read_meanwhile(model: Path) -> None:
    part = Part(model, 2)
    experts = part.experts(1, range(EXPERTS))
    seen: list[int] = []

    def work(first: int, weights: list[ExpertWeights]) -> None:
        for place, each in enumerate(weights, first):
            for _ in range(3):
                assert each.content_hash() == part.store.hashes[1][place]
            seen.append(place)

    for _ in range(5):
        part.memory.use(experts, work)
    assert sorted(seen) == sorted(list(range(EXPERTS)) * 5)


def test_an_error_of_one_call_leaves_nothing_behind(model: Path) -> None:
    part = Part(model, 3)

    def fail(_first: int, _weights: list[ExpertWeights]) -> None:
        raise RuntimeError("a bug")

    for seed in range(20):
        with pytest.raises(RuntimeError, match="a bug"):
            part.memory.use(part.experts(1, range(EXPERTS)), fail)
        assert_same(part, make_frame(seed, part.hidden_size))


def test_a_file_cut_short_fails_the_calls_that_need_it_and_no_others(tmp_path: Path) -> None:
    part = Part(write_paged(tmp_path / "model"), 2)
    shards = {layer: tmp_path / "model" / f"model-0000{layer + 1}-of-00004.safetensors" for layer in LAYERS}
    whole = shards[1].read_bytes()
    first, second = make_frame(7, part.hidden_size), make_frame(6, part.hidden_size)  # of layers 2 and 1
    with shards[1].open("r+b") as file:
        file.truncate(len(whole) // 2)
    for _ in range(3):
        (error,) = outcome(part.computer, second)
        assert isinstance(error, UnreadableWeights)
        assert f"{shards[1]} is shorter than it was; put the checkpoint back" in error.message
        assert_same_rows(part, first)
    shards[1].write_bytes(whole)
    assert_same(part, second)
    for shard in shards.values():  # what is open stays readable
        shard.unlink()
    assert_same(part, first, make_frame(15, part.hidden_size))
    assert part.memory.traffic.failed_reads >= 3


def assert_same_rows(part: Part, frame: Frame) -> None:
    """Without the mapped store, which must not be touched while a file is short."""
    found, again = outcome(part.computer, frame, frame)
    assert isinstance(found, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(found, again)


def test_what_is_dropped_makes_way_first(model: Path) -> None:
    part = Part(model, 2)
    hot, cold, new = part.experts(1, [0, 1, 2])

    def ignore(_first: int, _weights: list[ExpertWeights]) -> None:
        pass

    for _ in range(4):
        part.memory.use([hot], ignore)
    part.memory.use([cold], ignore)
    part.store.drop(1, 0)
    part.memory.use([new], ignore)
    before = part.memory.traffic.misses
    part.memory.use([cold, new], ignore)
    assert part.memory.traffic.misses == before


def test_each_memory_takes_what_it_is_for(model: Path) -> None:
    part = Part(model, 2)
    paged: list[Held] = [*part.experts(1, [0])]
    with pytest.raises(TypeError, match="need a LimitedMemory"):
        AllInMemory().use(paged, lambda _first, _weights: None)
    with pytest.raises(TypeError, match="for experts on disk"):
        part.memory.use(part.expected._store.find(1, [0]), lambda _first, _weights: None)


def worker(model: str, limit: str, **more: object) -> Worker:
    overrides = {"model": model, "worker.threads": 1, "worker.memory_limit": limit, **more}
    return Worker(load_config(environ={}, overrides=overrides))


def test_a_worker_has_as_many_as_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "resident_bytes", lambda: 2**30)
    room = 3 * 48 * 64 + 2 * 4 * 48 + 4 * 64
    limit = 2**30 + 2 * 2**16 + 5 * room
    found = worker(str(model), str(limit), **{"worker.max_frame": 2**16})
    assert isinstance(found.memory, LimitedMemory)
    assert found.memory.slots == 5
    assert (found.held, found.capacity) == (16, 16)
    routed = {"worker.max_frame": 2**16, "router.endpoint": "grpc://localhost:1", "worker.memory": "1GiB"}
    found = worker(str(model), str(limit), **routed)
    assert isinstance(found.memory, LimitedMemory)
    assert (found.held, found.capacity, found.memory.slots) == (0, 16, 3)  # scales of 16 are to come
    everything = worker(str(model), "2GiB")
    assert isinstance(everything.memory, LimitedMemory)
    assert everything.memory.slots == 16
    with pytest.raises(ConfigError, match=r"1MiB is too little: the process takes 1024MiB .* give it 1153MiB or more"):
        worker(str(model), "1MiB")


def test_limits_that_cannot_be_kept_say_what_to_do(tmp_path: Path) -> None:
    floats = save_mixtral(tmp_path / "float")
    for name, more in ((str(floats), {}), ("shape:tiny", {}), (str(floats), {"router.endpoint": "grpc://localhost:1"})):
        with pytest.raises(ConfigError, match=r"worker.memory_limit: .* write such a one with: consilium quantize"):
            worker(name, "4GiB", **more)
