"""The cache's parts: what is in a key, what a value in Redis must be, what memory keeps, when the breaker opens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gateway.batches import ExpertBatches
from gateway.cache import keys as keys_module
from gateway.cache.breaker import FAILURES, FIRST_PAUSE, LAST_PAUSE, WINDOW, Breaker
from gateway.cache.keys import NAMESPACE, RowKeys
from gateway.cache.memory import ENTRY_OVERHEAD, MemoryCache
from gateway.cache.value import RowCodec
from gateway.placement import ExpertIdentity

# -- keys ------------------------------------------------------------------------------------------------------------

IDENTITY = ExpertIdentity(b"w" * 16, "int8/cpu/v1")


def one_row(values: list[int] | None = None, scale: float = 0.5) -> ExpertBatches:
    """A single row for experts 3 and 5."""
    rows = torch.tensor([values or [1, -2, 127]], dtype=torch.int8)
    pairs = np.array([0, 0])
    return ExpertBatches(rows, torch.tensor([scale]), np.array([3, 5]), np.array([0, 1, 2]), np.array([0, 1]), pairs, 2)


def key(
    batches: ExpertBatches | None = None,
    layer: int = 7,
    identity: ExpertIdentity = IDENTITY,
    dtype: str = "torch.float32",
    salt: str = "",
) -> bytes:
    known = {(layer, expert): identity for expert in (3, 5)}
    made = RowKeys(known, dtype, salt).of_pairs(layer, batches or one_row())[0]
    assert made is not None
    return made


def other_schema() -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "SCHEMA", keys_module.SCHEMA + 1)
        return key()


CHANGES: dict[str, Callable[[], bytes]] = {
    "schema": other_schema,
    "weights": lambda: key(identity=IDENTITY._replace(weights=b"v" * 16)),
    "numerics class": lambda: key(identity=IDENTITY._replace(numerics_class="int8/cuda/v1")),
    "reply dtype": lambda: key(dtype="torch.bfloat16"),
    "layer": lambda: key(layer=8),
    "expert": lambda: RowKeys({(7, 5): IDENTITY}, "torch.float32", "").of_pairs(7, one_row())[1] or b"",
    "a value of the row": lambda: key(one_row([1, -2, 126])),
    "the row's sign": lambda: key(one_row([-1, 2, -127])),
    "the scale": lambda: key(one_row(scale=0.5000001)),
    "the sign of a zero scale": lambda: key(one_row(scale=-0.0)),
    "salt": lambda: key(salt="tenant"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_ingredient_changes_the_key(change: str) -> None:
    reference = key(one_row(scale=0.0)) if change == "the sign of a zero scale" else key()
    assert CHANGES[change]() != reference


def test_the_same_ingredients_give_the_same_key() -> None:
    assert key() == key(one_row())
    assert key().startswith(NAMESPACE)
    assert hashlib.sha256(bytes(8) + one_row().rows.numpy().tobytes() + np.float32(0.5).tobytes()).hexdigest() in (
        key().decode()
    )


def test_keys_do_not_depend_on_the_other_rows() -> None:
    alone = one_row()
    scales = torch.tensor([9.0, 0.5])
    rows = torch.cat([torch.zeros(1, 3, dtype=torch.int8), alone.rows])
    together = replace(alone, rows=rows, scales=scales, tokens=np.array([1, 1]), places=4)
    assert key(together) == key(alone)


def test_an_unknown_expert_has_no_key() -> None:
    keys = RowKeys({(7, 5): IDENTITY}, "torch.float32", "").of_pairs(7, one_row())
    assert keys[0] is None
    assert keys[1] is not None


# -- values ----------------------------------------------------------------------------------------------------------

ROW = np.arange(6, dtype=np.float32).tobytes()
CODEC = RowCodec(torch.float32, 6, "salt")
VALUE = CODEC.encode(b"key", ROW)


def test_a_value_reads_back() -> None:
    assert CODEC.decode(b"key", VALUE) == ROW


GARBAGE: dict[str, object] = {
    "nothing": None,
    "empty": b"",
    "not bytes": "text",
    "a number": 7,
    "a list": [VALUE],
    "an error": RuntimeError("no"),
    "noise": hashlib.shake_256(b"noise").digest(len(VALUE)),
    "zeros": bytes(len(VALUE)),
    "truncated": VALUE[:-1],
    "too long": VALUE + b"\0",
    "only a header": VALUE[:12],
    "another key's": CODEC.encode(b"yek", ROW),
    "another dtype": RowCodec(torch.bfloat16, 12, "salt").encode(b"key", ROW),
    "another length": RowCodec(torch.float32, 5, "salt").encode(b"key", ROW[:20]),
    "another salt": RowCodec(torch.float32, 6, "pepper").encode(b"key", ROW),
    "another version": VALUE[:3] + b"\x02" + VALUE[4:],
    "another row's data": VALUE[:28] + ROW[::-1],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_no_row(kind: str) -> None:
    assert CODEC.decode(b"key", GARBAGE[kind]) is None


@given(st.integers(0, len(VALUE) * 8 - 1))
def test_a_flipped_bit_is_no_row(bit: int) -> None:
    damaged = bytearray(VALUE)
    damaged[bit // 8] ^= 1 << bit % 8
    assert CODEC.decode(b"key", bytes(damaged)) is None


@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_no_row(value: bytes) -> None:
    assert CODEC.decode(b"key", value) is None


# -- memory ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_row_goes_first() -> None:
    memory = MemoryCache(2 * (ENTRY_OVERHEAD + 11))
    memory.put(b"a", b"0123456789")
    memory.put(b"b", b"0123456789")
    assert memory.get(b"a") is not None
    memory.put(b"c", b"0123456789")
    assert memory.get(b"b") is None
    assert memory.get(b"a") == memory.get(b"c") == b"0123456789"
    assert memory.evictions == 1


@given(st.integers(0, 2000), st.lists(st.tuples(st.binary(min_size=1, max_size=2), st.binary(max_size=400))))
def test_memory_never_exceeds_its_bytes(capacity: int, items: list[tuple[bytes, bytes]]) -> None:
    memory = MemoryCache(capacity)
    latest: dict[bytes, bytes] = {}
    for name, row in items:
        memory.put(name, row)
        latest[name] = row
        assert memory.bytes <= capacity
    kept = {name: found for name in latest if (found := memory.get(name)) is not None}
    assert kept.items() <= latest.items()  # never an old row
    assert len(kept) == len(memory)
    assert memory.bytes == sum(ENTRY_OVERHEAD + len(name) + len(row) for name, row in kept.items())


# -- breaker ---------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES):
        breaker.failed()
    assert breaker.state == "open"
    return breaker


def test_enough_failures_within_the_window_open_it_whatever_succeeds_between() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(FAILURES - 1):
        breaker.failed()
        breaker.succeeded()
        assert breaker.state == "closed"
        assert breaker.permit()
    breaker.failed()
    assert breaker.state == "open"
    assert not breaker.permit()


def test_failures_spread_over_more_than_the_window_do_not_open_it() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    for _ in range(10 * FAILURES):
        breaker.failed()
        clock.now += WINDOW / (FAILURES - 1) + 0.01
    assert breaker.state == "closed"


def test_one_attempt_decides_after_the_pause() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE - 0.01
    assert not breaker.permit()
    clock.now += 0.01
    assert breaker.permit()
    assert breaker.state == "half_open"
    assert not breaker.permit()  # until the first attempt's outcome is known
    breaker.succeeded()
    breaker.failed()  # old failures are forgotten
    assert breaker.permit()
    assert breaker.permit()


def test_pauses_grow_until_it_stays_closed() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(7):
        clock.now += breaker.pause
        assert breaker.permit()
        breaker.failed()
        assert not breaker.permit()
        pauses.append(breaker.pause)
    assert pauses == [2, 4, 8, 16, LAST_PAUSE, LAST_PAUSE, LAST_PAUSE]
    for closed_for, pause in ((0.0, LAST_PAUSE), (WINDOW, FIRST_PAUSE), (WINDOW / 2, 2 * FIRST_PAUSE)):
        clock.now += breaker.pause
        assert breaker.permit()
        breaker.succeeded()
        clock.now += closed_for
        for _ in range(FAILURES):
            breaker.failed()
        assert breaker.state == "open"
        assert breaker.pause == pause


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=300))
def test_failed_attempts_are_bounded(events: list[tuple[float, bool]]) -> None:
    """However failures and successes alternate: no more in the shortest pause than what opens it, before and after."""
    clock = Clock()
    breaker = Breaker(clock)
    failures: list[float] = []
    for wait, works in events:
        clock.now += wait
        if breaker.permit():
            if works:
                breaker.succeeded()
            else:
                breaker.failed()
                failures.append(clock.now)
        recent = [each for each in failures if each > clock.now - FIRST_PAUSE]
        assert len(recent) <= 2 * FAILURES
