"""Durations and sizes: what people write is what is meant, and what is written out reads back exactly."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("2s", 2.0),
        ("1m", 60.0),
        ("1.5h", 5400.0),
        ("250us", 0.00025),
        ("3", 3.0),
        (" 3 s ", 3.0),
        ("2S", 2.0),
        (0.1, 0.1),
        (1e-7, 1e-7),
        (7, 7.0),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MiB", 2**26),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        ("3kb", 3000),
        ("7B", 7),
        ("12", 12),
        (2**53 + 1, 2**53 + 1),
        (str(2**53 + 1), 2**53 + 1),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "-1s",
        "1e3",
        "1 2s",
        "5parsecs",
        "1.s",
        "²",
        True,
        None,
        [1],
        -1,
        math.nan,
        math.inf,
        10**40,
        "9" * 40,
    ],
)
@pytest.mark.parametrize("parse", [parse_duration, parse_size])
def test_everything_else_is_a_value_error(parse: type, text: object) -> None:
    with pytest.raises(ValueError, match=r"number"):
        parse(text)


@given(st.floats(0, 2.0**62))
def test_durations_read_back_exactly(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**33).map(lambda n: n * 2**20))
def test_sizes_read_back_exactly(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_the_written_form_is_the_usual_one() -> None:
    assert [format_duration(s) for s in (0.5, 2, 90, 120, 0)] == ["500ms", "2s", "90s", "2m", "0s"]
    assert [format_size(b) for b in (0, 1000, 2**16, 2**26, 2**31)] == ["0", "1000", "64KiB", "64MiB", "2GiB"]
