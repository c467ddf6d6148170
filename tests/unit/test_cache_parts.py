"""The cache's parts: what is in a key, what a value in Redis must be, what memory keeps, when the breaker opens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.gate import Routing
from gateway.batches import ExpertBatches, group_by_expert
from gateway.cache import keys as keys_module
from gateway.cache.breaker import FAILURES, FIRST_PAUSE, LAST_PAUSE, WINDOW, Breaker
from gateway.cache.keys import NAMESPACE, RowKeys, redis_names
from gateway.cache.memory import ENTRY_OVERHEAD, MemoryCache
from gateway.cache.value import RowCodec
from gateway.placement import ExpertIdentity

# -- keys ------------------------------------------------------------------------------------------------------------

IDENTITY = ExpertIdentity(b"w" * 16, "int8/v1")


def rows_of(values: list[list[int]], scales: list[float], experts: list[list[int]]) -> ExpertBatches:
    """Rows that go to these experts."""
    weights = torch.ones(len(experts), len(experts[0]))
    routing = Routing(torch.tensor(experts), weights)
    return group_by_expert(torch.tensor(values, dtype=torch.int8), torch.tensor(scales), routing)


def one_row(values: list[int] | None = None, scale: float = 0.5, expert: int = 5) -> ExpertBatches:
    """A single row, for expert 3 and another one."""
    return rows_of([values or [1, -2, 127]], [scale], [[3, expert]])


def key(
    batches: ExpertBatches | None = None,
    layer: int = 7,
    identity: ExpertIdentity = IDENTITY,
    dtype: str = "torch.float32",
    salt: str = "",
) -> bytes:
    known = {(layer, 3): IDENTITY, (layer, 5): identity, (layer, 7): identity}
    made = RowKeys(known, dtype, salt).of_rows(layer, batches or one_row())[0]
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
    "expert": lambda: key(one_row(expert=7)),
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
    assert key(salt="tenant") == key(salt="tenant")
    assert redis_names(7, [key()]) == [NAMESPACE + b"1:7:" + key().hex().encode()]


def test_keys_do_not_depend_on_the_other_rows() -> None:
    together = rows_of([[0, 0, 0], [1, -2, 127]], [9.0, 0.5], [[5, 7], [3, 5]])
    known = {(7, expert): IDENTITY for expert in (3, 5, 7)}
    assert RowKeys(known, "torch.float32", "").of_rows(7, together)[1] == key()


@pytest.mark.parametrize("missing", [3, 5])
def test_a_row_with_an_unknown_expert_has_no_key(missing: int) -> None:
    known = {(7, expert): IDENTITY for expert in (3, 5, 7) if expert != missing}
    keys = RowKeys(known, "torch.float32", "").of_rows(7, rows_of([[1], [1]], [1.0, 1.0], [[3, 5], [missing ^ 6, 7]]))
    assert [each is None for each in keys] == [True, False]


@pytest.mark.parametrize("known", [{}, {(7, 0): IDENTITY}, {(6, 3): IDENTITY, (6, 5): IDENTITY}])
def test_nothing_known_is_no_key(known: dict[tuple[int, int], ExpertIdentity]) -> None:
    assert RowKeys(known, "torch.float32", "").of_rows(7, one_row()) == [None]


# -- values ----------------------------------------------------------------------------------------------------------

ROW = np.arange(6, dtype=np.float32).tobytes()
CODEC = RowCodec(torch.float32, 2, 3, "salt")
VALUE = CODEC.encode(b"key", ROW)


def test_a_value_reads_back() -> None:
    row = CODEC.decode(b"key", VALUE)
    assert row is not None
    assert bytes(row) == ROW


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
    "only a header": VALUE[:16],
    "another key's": CODEC.encode(b"yek", ROW),
    "another dtype": RowCodec(torch.bfloat16, 4, 3, "salt").encode(b"key", ROW),
    "another length": RowCodec(torch.float32, 2, 2, "salt").encode(b"key", ROW[:16]),
    "another shape": RowCodec(torch.float32, 3, 2, "salt").encode(b"key", ROW),
    "another salt": RowCodec(torch.float32, 2, 3, "pepper").encode(b"key", ROW),
    "another version": VALUE[:3] + b"\x02" + VALUE[4:],
    "another row's data": VALUE[:32] + ROW[::-1],
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


ENTRY = ENTRY_OVERHEAD + 4  # one expert, two elements of bfloat16


def memory_of(entries: float) -> MemoryCache:
    return MemoryCache(int(entries * ENTRY), torch.bfloat16, 1, 2)


def row(number: int) -> Tensor:
    return torch.full((1, 1, 2), number, dtype=torch.bfloat16)


def test_the_least_recently_used_row_goes_first() -> None:
    memory = memory_of(2)
    memory.put([b"a"], row(1))
    memory.put([b"b"], row(2))
    assert memory.find([b"a"])[0] == [0]
    memory.put([b"c"], row(3))
    found, rows = memory.find([b"b", None, b"c", b"a"])
    assert found == [2, 3]
    assert rows[:, 0, 0].tolist() == [3, 1]
    assert memory.evictions == 1


@given(st.floats(0, 6), st.lists(st.lists(st.integers(0, 9), min_size=1), max_size=20))
def test_memory_never_exceeds_its_bytes_and_never_mixes_rows(entries: float, steps: list[list[int]]) -> None:
    memory = memory_of(entries)
    for numbers in steps:
        memory.put([b"%d" % number for number in numbers], torch.cat([row(number) for number in numbers]))
        assert memory.size == len(memory) * ENTRY <= memory.capacity
        if int(entries):
            assert memory.find([b"%d" % numbers[-1]])[0] == [0]  # the newest
    found, rows = memory.find([b"%d" % number for number in range(10)])
    assert rows[:, 0, 1].tolist() == found
    assert len(found) == len(memory)


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
