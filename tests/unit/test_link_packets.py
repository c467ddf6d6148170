"""Packets and blocks: a frame reads back as it was written; whatever lies in memory instead is a WireError."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium.errors import WireError
from consilium.frames import Frame
from consilium.link_packets import (
    CALL,
    CANCEL,
    ERROR,
    LENGTHS,
    RESULT,
    Block,
    CallPacket,
    RowFormat,
    pack_cancel,
    pack_error,
    pack_result,
    unpack_cancel,
    unpack_error,
    unpack_result,
)
from consilium.shared_memory import ALIGNMENT
from tests.links import block_of, place, shared_memory
from tests.unit.test_frames import HIDDEN, equal, frames

SIZE = 2**13
FORMS = [
    RowFormat(HIDDEN, torch.int8, torch.float32),
    RowFormat(HIDDEN, torch.int8, torch.bfloat16),
    RowFormat(HIDDEN, torch.bfloat16, torch.bfloat16),
    RowFormat(HIDDEN, torch.float32, torch.float32),
]
forms = st.sampled_from(FORMS)
U32, U64, INT32 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(-(2**31), 2**31 - 1)
link_frames = frames(last_expert=2**31 - 1, fewest=1)
begins = st.integers(0, 40).map(lambda each: each * ALIGNMENT)


def form_of(frame: Frame) -> RowFormat:
    return next(each for each in FORMS if each.rows is frame.rows.dtype)


@given(link_frames, U64, begins)
def test_a_frame_round_trips(frame: Frame, call_id: int, begin: int) -> None:
    ours, theirs = shared_memory(SIZE)
    form = form_of(frame)
    form.check(frame)
    packet = place(frame, form, ours, call_id, begin)
    block = block_of(packet, form)
    found = block.read(packet, form, theirs)
    assert equal(found, frame)
    memory = np.asarray(theirs.array((SIZE,), np.uint8, 0)).ctypes.data
    if frame.rows.numel():
        assert found.rows.data_ptr() == memory + block.rows, "rows stay where they are"
    written = np.flatnonzero(ours.array((SIZE,), np.uint8, 0))
    assert all(block.begin <= each < block.result for each in written), "the result's place is left alone"


@given(st.builds(CallPacket, st.booleans(), U32, U64, U64, U32, U32, U32, U32))
def test_a_call_round_trips(packet: CallPacket) -> None:
    data = packet.pack()
    assert (data[0], len(data)) == (CALL, LENGTHS[CALL])
    assert CallPacket.unpack(memoryview(data)) == packet


@given(U64, U32, U32, st.binary(max_size=50))
def test_the_others_round_trip(call_id: int, queue_us: int, compute_us: int, error: bytes) -> None:
    cancel, result, failed = (
        pack_cancel(call_id),
        pack_result(call_id, queue_us, compute_us),
        pack_error(call_id, error),
    )
    assert [cancel[0], result[0], failed[0]] == [CANCEL, RESULT, ERROR]
    assert len(cancel) == LENGTHS[CANCEL]
    assert unpack_cancel(memoryview(cancel)) == call_id
    assert unpack_result(memoryview(result)) == (call_id, queue_us, compute_us)
    assert unpack_error(memoryview(failed)) == (call_id, error)


@pytest.mark.parametrize("unpack", [CallPacket.unpack, unpack_cancel, unpack_result])
def test_a_packet_of_another_length_is_none(unpack: Callable[[memoryview], object]) -> None:
    taken = []
    for length in range(80):
        with contextlib.suppress(struct.error):
            unpack(memoryview(bytes(length)))
            taken.append(length)
    assert len(taken) == 1


def test_an_error_shorter_than_its_head_is_none() -> None:
    head = len(pack_error(1, b""))
    for length in range(head):
        with pytest.raises(struct.error):
            unpack_error(memoryview(bytes(length)))
    assert unpack_error(memoryview(bytes(head))) == (0, b"")


@given(forms, st.integers(0, 2**58).map(lambda each: each * ALIGNMENT), U32, U32, U32)
def test_the_parts_of_a_block_are_aligned_and_do_not_overlap(
    form: RowFormat, begin: int, rows: int, experts: int, pairs: int
) -> None:
    """However large: Python's numbers do not wrap."""
    block = Block(begin, rows, experts, pairs, form)
    assert all(each % ALIGNMENT == 0 for each in (block.scales, block.rows, block.result))
    assert block.scales - begin >= 4 * (2 * experts + 1 + pairs)
    assert block.rows - block.scales >= (4 * rows if form.rows is torch.int8 else 0)
    assert block.result - block.rows >= rows * HIDDEN * form.rows.itemsize
    assert block.end - block.result == pairs * HIDDEN * form.replies.itemsize
    assert block.end - begin == Block(0, rows, experts, pairs, form).end, "it takes as much anywhere"
    needed = 4 * (2 * experts + 1 + pairs + rows) + rows * HIDDEN * form.rows.itemsize
    assert block.result - begin < needed + 3 * ALIGNMENT


@pytest.mark.parametrize("form", FORMS)
def test_a_frame_of_other_rows_does_not_fit(form: RowFormat) -> None:
    indices = torch.zeros(1, dtype=torch.int32)
    fits = []
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        for scales in (None, torch.ones(2)):
            for width in (1, HIDDEN, HIDDEN + 1):
                try:
                    form.check(Frame(0, torch.ones(2, width, dtype=dtype), scales, [0], [0, 1], indices))
                except WireError:
                    continue
                fits.append((dtype, scales is not None, width))
    assert fits == [(form.rows, form.rows is torch.int8, HIDDEN)]


def check(packet: CallPacket, form: RowFormat, numbers: list[int]) -> None:
    """What lies in memory is a WireError, or a frame that can be computed."""
    memory, _ = shared_memory(SIZE)
    size = 2 * packet.experts + 1 + packet.pairs
    memory.array((size,), np.int32, packet.begin)[:] = (numbers * size)[:size]
    try:
        frame = block_of(packet, form).read(packet, form, memory)
    except WireError:
        return
    assert frame.offsets[0] == 0
    assert frame.offsets[-1] == packet.pairs == frame.indices.numel()
    assert all(a < b for a, b in zip(frame.experts, frame.experts[1:], strict=False))
    assert frame.rows[frame.indices.long()].shape == (packet.pairs, HIDDEN)


@settings(max_examples=300)
@given(
    forms,
    st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 12)),
    st.lists(st.integers(-2, 12) | INT32, min_size=1, max_size=23),
)
def test_any_numbers(form: RowFormat, counts: tuple[int, int, int], numbers: list[int]) -> None:
    check(CallPacket(False, 1, 1, 0, *counts, 0), form, numbers)


@settings(max_examples=150)
@given(link_frames, st.data())
def test_any_damage_to_a_frame_and_its_counts(frame: Frame, data: st.DataObject) -> None:
    numbers = [*frame.experts, *frame.offsets, *frame.indices.tolist()]
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(numbers) - 1))
        near = st.integers(-3, 3).map(numbers[at].__add__)
        numbers[at] = min(max(data.draw(near | INT32), -(2**31)), 2**31 - 1)
    counts = len(frame.rows), len(frame.experts), frame.indices.numel()
    rows, experts, pairs = (max(0, each + data.draw(st.integers(-1, 1))) for each in counts)
    check(CallPacket(False, 1, 1, 0, rows, experts, pairs, 0), form_of(frame), numbers)
