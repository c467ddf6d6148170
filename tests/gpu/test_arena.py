"""Arenas as both ends know them, and who computes what in them; without any process."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from consilium.errors import InvalidRequest, NotReady, WireError
from consilium.gpu.arena import ALIGNMENT, GATEWAY_SILENT, LINE, MOST_WORKERS, Arena, ArenaShape
from consilium.gpu.device_memory import tensor_at
from consilium.gpu.flags import meet, own_pairs
from consilium.link_packets import ARENA, LENGTHS, STEP, ArenaPacket, StepPacket
from expert_service import device_steps
from expert_service.device_steps import DeviceSteps, larger_sizes, take_streams
from gateway.device_hop import owners_of
from gateway.placement import build_placement

SHAPE = ArenaShape(3, 6, 5, 2, 48, 4, torch.int8, torch.bfloat16)


def test_every_part_has_its_place() -> None:
    memory = torch.zeros(SHAPE.size, dtype=torch.uint8)
    arena = Arena(SHAPE, memory)
    parts = [arena.owners, arena.ids, arena.scales, arena.rows, arena.outputs, arena.request, arena.broken, *arena.done]
    begins = [each.data_ptr() - memory.data_ptr() for each in parts]
    assert all(begin % ALIGNMENT == 0 for begin in begins[:5])
    assert all(begin % (4 * LINE) == 0 for begin in begins[5:])
    for value, part in enumerate(parts, 1):
        part.fill_(value)
    assert [part.unique().tolist() for part in parts] == [[value] for value in range(1, len(parts) + 1)]


def test_shapes_and_packets_arrive_as_they_were_sent() -> None:
    assert ArenaShape.unpack(SHAPE.pack()) == SHAPE
    opening, step = ArenaPacket(3, 2000, 7, b"h" * 64, SHAPE.pack()), StepPacket(5, -(2**31), 2**63)
    for packet, kind in ((opening, ARENA), (step, STEP)):
        assert len(packet.pack()) == LENGTHS[kind]
        assert packet.pack()[0] == kind
    assert ArenaPacket.unpack(memoryview(opening.pack())) == opening
    assert StepPacket.unpack(memoryview(step.pack())) == step


@pytest.mark.parametrize("sizes", [{"layers": 0}, {"workers": MOST_WORKERS + 1}, {"tokens": 2**32 - 1}])
def test_sizes_that_no_arena_has_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(WireError):
        ArenaShape.unpack(replace(SHAPE, **sizes).pack())  # type: ignore[arg-type]  # sizes are all numbers


def test_a_word_that_wraps_around_is_not_behind(device: torch.device) -> None:
    base, broken, word, told = (torch.zeros(LINE, dtype=torch.int32, device=device) for _ in range(4))
    base.fill_(2**31 - 2)
    word.fill_(-(2**31) + 3)  # five steps on
    meet(base, broken, tell=told, tell_at=4, words=word, count=1, wait_at=5, blame=1, spins=1)
    assert (int(broken[0]), int(told[0])) == (0, -(2**31) + 2)
    meet(base, broken, words=word, count=1, wait_at=6, blame=GATEWAY_SILENT, spins=3)
    assert int(broken[0]) == GATEWAY_SILENT
    meet(base, broken, words=word, count=1, wait_at=6, blame=2, spins=2**30)  # nobody waits any more
    assert int(broken[0]) == GATEWAY_SILENT


def test_own_pairs_are_those_of_the_owner(device: torch.device) -> None:
    owners = torch.tensor([1, 0, 1, 7], dtype=torch.int32, device=device)
    held = torch.tensor([[5, 0], [0, 0], [5, 0], [0, 0]], device=device)
    ids = torch.tensor([[0, 1], [2, -1], [3, 4], [0, 2]], dtype=torch.int32, device=device)
    own = torch.full((8,), 99, dtype=torch.int32, device=device)
    broken = torch.zeros((), dtype=torch.int32, device=device)
    own_pairs(ids, owners, held, own, broken, worker=1, blame=2)
    assert own.tolist() == [0, -1, 2, -1, -1, -1, 0, 2]
    assert int(broken) == 0
    own_pairs(ids, owners, held, own, broken, worker=0, blame=1)  # it does not have expert 1
    assert (own.tolist(), int(broken)) == ([-1] * 8, 1)
    own_pairs(ids, owners, held, own, broken, worker=1, blame=2)
    assert own.tolist() == [-1] * 8


def test_every_expert_has_one_owner_and_members_share_evenly() -> None:
    layers, experts = (1, 3), 8
    everything = [(layer, expert) for layer in layers for expert in range(experts)]
    held = {"a": everything, "b": [each for each in everything if each[1] >= 4], "c": everything[:3]}
    owners = owners_of(build_placement(held), ["a", "b"], layers, experts)
    assert owners is not None
    assert owners.shape == (2, 8)
    assert owners[:, :4].tolist() == [[0] * 4] * 2  # nobody else has them
    assert np.bincount(owners[0]).tolist() == [4, 4]
    assert owners_of(build_placement(held), ["b", "c"], layers, experts) is None


def test_memory_that_others_keep_is_a_tensor_of_the_device_that_reaches_it(device: torch.device) -> None:
    kept = torch.arange(16, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        seen = tensor_at(kept.data_ptr(), 12, device)
        assert (seen.device, seen.tolist()) == (kept.device, list(range(12)))
        seen.view(torch.int32)[1] = -1
    assert kept[3:9].tolist() == [3, 255, 255, 255, 255, 8]


def test_larger_steps_are_tried_in_doublings() -> None:
    assert list(larger_sizes(5)) == [5]
    assert list(larger_sizes(512)) == [512]
    assert list(larger_sizes(1500)) == [512, 1024, 1500]


def test_streams_of_links_are_nobody_elses_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()

    def make(_: torch.device, priority: int) -> int:
        made.append(priority)
        return len(made)

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(device_steps, "FREE", [])
    first, other = (take_streams(torch.device("cuda")) for _ in range(2))
    assert [str(each) for each in (*first, *other)] == ["1", "2", "3", "4"]
    assert made == [-1, -2] * 2  # those of frames have none
    device_steps.FREE.append(first)
    assert take_streams(torch.device("cuda")) == first


class FailedKernels:
    """Of a GPU that has failed."""

    device = torch.device("cpu")

    @property
    def layers(self) -> list[int]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_gpu_that_fails_in_a_step_makes_its_worker_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    told, answers = list[tuple[int, int]](), SimpleQueue[Exception | tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda *given: told.append(given))
    steps = DeviceSteps(FailedKernels(), lambda: None)  # type: ignore[arg-type]  # nothing else is reached
    steps.submit(ArenaPacket(0, 2000, 7, b"h" * 64, SHAPE.pack()), answers.put)
    assert isinstance(answers.get(timeout=30), NotReady)
    assert told == [(os.getpid(), signal.SIGTERM)]
    steps.submit(StepPacket(1, 0, 8), answers.put)
    assert isinstance(answers.get(timeout=30), InvalidRequest)  # its thread goes on
    steps.close(30)
