"""The worker's end of a local link against a gateway that lies, over a socket pair."""

from __future__ import annotations

import gc
import itertools
import socket
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from consilium.errors import WireError
from consilium.frames import Frame, encode_call
from consilium.link_packets import ERROR, RESULT, CallPacket, RowFormat, pack_cancel, pack_error, pack_result
from consilium.local_socket import PACKET
from consilium.shared_memory import SharedMemory
from expert_service.calls import SharedCall
from expert_service.executor import Executor
from expert_service.local_link import LocalLink
from tests.links import Answer, block_of, packet_of, place, read_answer, result_rows, shared_memory, socket_pair
from tests.unit.test_executor import LAYER, MAX_FRAME, Gate, compute, make_computer, make_frame
from tests.unit.test_experts import HIDDEN

SECONDS = 30.0
SIZE = 2**18
FORM = RowFormat(HIDDEN, torch.float32, torch.float32)
ROWS = 60
FRAME = make_frame(ROWS)  # of experts 0 and 4, so there are 2 * ROWS pairs
MOST = 2**32 - 1


@dataclass
class Caller:
    """Raw packets to a worker's end, on memory of the test's."""

    socket: socket.socket
    memory: SharedMemory
    executor: Executor

    def send(self, packet: CallPacket) -> None:
        self.socket.send(packet.pack())

    def send_small(self, call_id: int, pairs: int = 1) -> None:
        """A call whose frame is in order, in a place of its own."""
        self.send(place(make_frame(pairs, (0,)), FORM, self.memory, call_id, (call_id % 8) * 2**13))

    def receive(self) -> Answer:
        return read_answer(self.socket.recv(PACKET))

    def ask(self, packet: CallPacket) -> Answer:
        self.send(packet)
        return self.receive()

    def assert_serves(self) -> None:
        packet = place(FRAME, FORM, self.memory, 99)
        assert self.ask(packet) == Answer(99)
        (expected,) = compute(make_computer(), encode_call(FRAME, 1))
        assert torch.equal(result_rows(packet, FORM, self.memory), expected)

    def close(self) -> None:
        self.socket.close()
        assert self.executor.close(SECONDS)


def link_to(executor: Executor) -> Caller:
    """One more caller."""
    ours, theirs = socket_pair()
    ours.settimeout(SECONDS)
    memory, attached = shared_memory(SIZE)
    executor.add_link(LocalLink(theirs, attached, FORM, executor.submit))
    return Caller(ours, memory, executor)


def open_caller(gate: Gate | None = None) -> Caller:
    return link_to(Executor(gate or make_computer(), 4, 2**24))


@pytest.fixture
def caller() -> Iterator[Caller]:
    made = open_caller()
    yield made
    made.close()


# -- calls that lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("frame", [FRAME, make_frame(2, ()), make_frame(0, ())], ids=["full", "no pairs", "empty"])
def test_the_rows_of_the_result_are_in_the_block(caller: Caller, frame: Frame, last: bool) -> None:
    """At the beginning of the memory, and at the last place where it fits: arrays without rows begin at its end."""
    size = block_of(packet_of(frame), FORM).end
    packet = place(frame, FORM, caller.memory, begin=(SIZE - size) // 64 * 64 if last else 0)
    assert caller.ask(packet) == Answer(1)
    (expected,) = compute(make_computer(), encode_call(frame, 1))
    assert torch.equal(result_rows(packet, FORM, caller.memory), expected)


OUTSIDE = "DATA_LOSS: the call's"
BAD_PACKETS: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({"begin": SIZE}, OUTSIDE),
    "over the end": ({"begin": (SIZE - block_of(packet_of(FRAME), FORM).end) // 64 * 64 + 64}, OUTSIDE),
    "far away": ({"begin": 2**64 - 64}, OUTSIDE),
    "the very end": ({"begin": SIZE, "rows": 0, "experts": 0, "pairs": 0}, OUTSIDE),
    "not aligned": ({"begin": 4}, OUTSIDE),
    "aligned to half": ({"begin": 32}, OUTSIDE),
    "most rows": ({"rows": MOST}, OUTSIDE),
    "more rows than a frame may have": ({"rows": MAX_FRAME // 4 // HIDDEN + 1}, "INVALID_ARGUMENT: the call takes"),
    "most experts": ({"experts": MOST}, OUTSIDE),
    "most pairs": ({"pairs": MOST}, OUTSIDE),
    "a result larger than a frame": ({"pairs": MAX_FRAME // 4 // HIDDEN + 1}, "INVALID_ARGUMENT: the result of"),
    "most of all": (dict.fromkeys(("rows", "experts", "pairs"), MOST) | {"begin": 2**64 - 1}, OUTSIDE),
    "fewer rows": ({"rows": ROWS - 1}, "DATA_LOSS: offsets: an expert computes a row once"),
    "no rows": ({"rows": 0}, "DATA_LOSS: offsets: an expert computes a row once"),
    "fewer pairs": ({"pairs": 2 * ROWS - 1}, "DATA_LOSS: offsets: expected 3 entries from 0 to 119"),
    "more pairs": ({"pairs": 2 * ROWS + 1}, "DATA_LOSS: offsets: expected 3 entries from 0 to 121"),
    "fewer experts": ({"experts": 1}, "DATA_LOSS: offsets: expected 2 entries"),
    "more experts": ({"experts": 3}, "DATA_LOSS: experts: must be ascending"),
    "more experts than pairs": ({"experts": 121}, "DATA_LOSS: experts: 121 for 120 rows"),
    "another layer": ({"layer": 77}, "FAILED_PRECONDITION: layer 77 is not on this worker"),
    "the last layer": ({"layer": MOST}, "FAILED_PRECONDITION: layer 4294967295"),
}


@pytest.mark.parametrize(("lie", "said"), BAD_PACKETS.values(), ids=BAD_PACKETS.keys())
def test_a_packet_that_lies_is_refused_and_the_link_goes_on(caller: Caller, lie: dict[str, Any], said: str) -> None:
    answer = caller.ask(place(FRAME, FORM, caller.memory)._replace(**lie))
    assert answer.call_id == 1
    assert answer.error.startswith(said)
    assert len(answer.error) < 500
    caller.assert_serves()


FIRST, LAST = -(2**31), 2**31 - 1  # of int32
EXPERTS, OFFSETS, INDICES = 0, 2, 5  # where they begin among the numbers of FRAME
BAD_NUMBERS: dict[str, tuple[int, int, str]] = {
    "an expert twice": (EXPERTS, 4, "DATA_LOSS: experts: must be ascending"),
    "experts that fall": (EXPERTS + 1, -1, "DATA_LOSS: experts: must be ascending"),
    "an expert that is negative": (EXPERTS, -1, "FAILED_PRECONDITION: experts -1 of layer"),
    "the first expert of all": (EXPERTS, FIRST, f"FAILED_PRECONDITION: experts {FIRST} of layer"),
    "the last expert of all": (EXPERTS + 1, LAST, f"FAILED_PRECONDITION: experts {LAST} of layer"),
    "offsets that do not begin at 0": (OFFSETS, 1, "DATA_LOSS: offsets: expected"),
    "offsets that begin before 0": (OFFSETS, -1, "DATA_LOSS: offsets: expected"),
    "an offset that is negative": (OFFSETS + 1, -1, "DATA_LOSS: offsets: must not fall"),
    "the first offset of all": (OFFSETS + 1, FIRST, "DATA_LOSS: offsets: must not fall"),
    "an offset past the end": (OFFSETS + 1, 2 * ROWS + 1, "DATA_LOSS: offsets: must not fall"),
    "the last offset of all": (OFFSETS + 1, LAST, "DATA_LOSS: offsets: must not fall"),
    "a row twice": (OFFSETS + 1, ROWS + 1, "DATA_LOSS: offsets: an expert computes a row once"),
    "offsets that end before the pairs": (OFFSETS + 2, 2 * ROWS - 1, "DATA_LOSS: offsets: expected"),
    "offsets that end after the pairs": (OFFSETS + 2, LAST, "DATA_LOSS: offsets: expected"),
    "an index too large": (INDICES, ROWS, "DATA_LOSS: indices: must lie in 0..59, found 0..60"),
    "the last index of all": (INDICES + 2 * ROWS - 1, LAST, f"DATA_LOSS: indices: must lie in 0..59, found 0..{LAST}"),
    "an index that is negative": (INDICES + 7, -1, "DATA_LOSS: indices: must lie in 0..59, found -1..59"),
    "the first index of all": (INDICES, FIRST, f"DATA_LOSS: indices: must lie in 0..59, found {FIRST}..59"),
}


def numbers_of(packet: CallPacket, memory: SharedMemory) -> NDArray[np.int32]:
    return memory.array((2 * packet.experts + 1 + packet.pairs,), np.int32, packet.begin)


@pytest.mark.parametrize(("where", "value", "said"), BAD_NUMBERS.values(), ids=BAD_NUMBERS.keys())
def test_numbers_that_lie_are_refused_and_the_link_goes_on(caller: Caller, where: int, value: int, said: str) -> None:
    packet = place(FRAME, FORM, caller.memory)
    numbers_of(packet, caller.memory)[where] = value
    assert caller.ask(packet).error.startswith(said)
    caller.assert_serves()


def test_as_many_experts_as_fit_cost_next_to_nothing() -> None:
    """A few bytes of packet, and memory that nobody has written to: they would be lists of millions of numbers."""
    many, form = 2**20, RowFormat(1, torch.int8, torch.bfloat16)
    _, memory = shared_memory(2**24)
    packet = CallPacket(False, LAYER, 1, 0, 0, many, 1, 0)
    assert block_of(packet, form).end < memory.size
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=f"experts: {many} for 1 rows"):
            SharedCall(packet, memory, form)
        assert tracemalloc.get_traced_memory()[1] < 2**16
    finally:
        tracemalloc.stop()


def test_numbers_that_change_after_they_were_checked_were_copied() -> None:
    gateways, workers = shared_memory(SIZE)
    packet = place(FRAME, FORM, gateways)
    frame = SharedCall(packet, workers, FORM).frame(FORM)
    numbers_of(packet, gateways)[:] = LAST
    assert (frame.experts, frame.offsets) == (FRAME.experts, FRAME.offsets)
    assert torch.equal(frame.indices, FRAME.indices)
    assert torch.equal(frame.rows, FRAME.rows)


def test_calls_whose_blocks_overlap_spoil_each_other_and_nothing_else(caller: Caller) -> None:
    packets = [place(FRAME, FORM, caller.memory, number, begin=64 * number) for number in range(4)]
    for packet in packets:
        caller.send(packet)
    assert sorted(caller.receive().call_id for _ in packets) == [0, 1, 2, 3]
    caller.assert_serves()


# -- packets that are none ---------------------------------------------------------------------------------------------


def test_garbage_closes_its_own_link(caller: Caller) -> None:
    call, cancel = packet_of(FRAME).pack(), pack_cancel(1)
    cut = [packet[:length] for packet in (call, cancel) for length in range(1, len(packet))]
    longer = [packet + tail for packet in (call, cancel) for tail in (b"\0", bytes(PACKET))]
    others = [pack_result(1, 0, 0), pack_error(1, b""), bytes(len(call)), b"\xff" * len(call), b"\x0a\x7fcut"]
    swapped = [cancel[:1] + call[1:], call[:1] + cancel[1:], bytes([RESULT]) + call[1:], bytes([ERROR]) + call[1:]]
    for packet in (*cut, *longer, *others, *swapped):
        other = link_to(caller.executor)
        other.socket.send(packet)
        assert other.socket.recv(PACKET) == b""
        other.socket.close()
    caller.assert_serves()


def test_a_cancel_that_comes_too_late_is_left_alone(caller: Caller) -> None:
    for call_id in (0, 9, 2**64 - 1):
        caller.socket.send(pack_cancel(call_id))
    caller.assert_serves()
    caller.socket.send(pack_cancel(99))
    caller.assert_serves()


# -- ids, ends and limits ----------------------------------------------------------------------------------------------


def test_an_id_in_use_a_cancel_and_a_disconnect() -> None:
    gate = Gate()
    caller = open_caller(gate)
    caller.send_small(1, pairs=11)
    assert gate.entered.wait(SECONDS)  # being computed
    caller.send_small(2, pairs=12)
    caller.send_small(3, pairs=13)
    caller.send_small(2, pairs=14)
    caller.socket.send(pack_cancel(3))
    gate.opened.set()
    in_use = Answer(2, "INVALID_ARGUMENT: call id 2 is in use on this link")
    dropped = Answer(3, "CANCELLED: cancelled by its caller before it was computed")
    assert [caller.receive() for _ in range(4)] == [Answer(1), in_use, dropped, Answer(2)]
    caller.send_small(3, pairs=15)  # it is free again
    assert caller.receive() == Answer(3)
    assert gate.computed == [11, 12, 15]
    caller.close()


def untouched(packet: CallPacket) -> CallPacket:
    return packet


@pytest.mark.parametrize(
    "change",
    [untouched, lambda packet: packet._replace(begin=SIZE), lambda packet: packet._replace(layer=77)],
    ids=["good", "lie", "stale"],
)
def test_the_memory_of_a_gateway_that_is_gone_is_unmapped(change: Callable[[CallPacket], CallPacket]) -> None:
    """At once, and not when the collector comes: errors hold frames, and those what they computed with."""
    ours, theirs = socket_pair()
    ours.settimeout(SECONDS)
    memory, attached = shared_memory(SIZE)
    unmapped = threading.Event()
    weakref.finalize(attached._map, unmapped.set)  # every tensor in it holds the map itself
    executor = Executor(make_computer(), 4, 2**24)
    executor.add_link(LocalLink(theirs, attached, FORM, executor.submit))
    del attached, theirs
    caller = Caller(ours, memory, executor)
    gc.disable()
    try:
        caller.ask(change(place(FRAME, FORM, memory)))
        ours.close()
        assert unmapped.wait(SECONDS)
    finally:
        gc.enable()
        assert executor.close(SECONDS)


def test_nobody_computes_for_a_gateway_that_is_gone() -> None:
    gate, empty = Gate(), threading.Event()
    caller = open_caller(gate)
    caller.send_small(1, pairs=1)
    assert gate.entered.wait(SECONDS)
    caller.send_small(2, pairs=2)
    caller.socket.close()
    gate.opened.set()
    caller.executor.queue.when_empty(empty.set)
    assert empty.wait(SECONDS)
    assert caller.executor.close(SECONDS)
    assert 2 not in gate.computed


def test_a_gateway_that_does_not_read_is_given_up(caller: Caller) -> None:
    packet = place(make_frame(1, (0,)), FORM, caller.memory)

    def ask_for_ever() -> None:
        for call_id in itertools.count():
            caller.send(packet._replace(call_id=call_id))

    with pytest.raises(ConnectionError):  # a time-out is none
        ask_for_ever()


def test_a_full_queue_is_an_error_of_the_call() -> None:
    gate = Gate()
    caller = open_caller(gate)
    caller.send_small(1)
    assert gate.entered.wait(SECONDS)
    for call_id in range(2, 7):  # read when the first is done
        caller.send_small(call_id)
    gate.opened.set()
    answers = [caller.receive() for _ in range(6)]
    assert sorted(each.call_id for each in answers) == [1, 2, 3, 4, 5, 6]
    assert [each.call_id for each in answers if each.error.startswith("RESOURCE_EXHAUSTED")] == [6]
    caller.close()
