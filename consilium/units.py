"""Durations and sizes as people write them: ``500ms``, ``2s``, ``64MiB``, bare numbers, also as strings."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

_SECONDS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def _quantity(value: object, units: dict[str, float] | dict[str, int], example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number with a unit such as {example}")
    match = _QUANTITY.fullmatch(str(value))
    if match is None or match[2].lower() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(f"{value!r} is not a number with a unit such as {example} (units: {known})")
    return float(match[1]) * units[match[2].lower()]


def parse_duration(value: object) -> float:
    """Seconds in ``value``; a bare number is seconds. Raises ValueError."""
    return _quantity(value, _SECONDS, "500ms")


def parse_size(value: object) -> int:
    """Bytes in ``value``; a bare number is bytes. Raises ValueError."""
    return int(_quantity(value, _BYTES, "64MiB"))


def format_duration(seconds: float) -> str:
    """The shortest exact text that :func:`parse_duration` reads back."""
    if seconds < 1:
        return f"{seconds * 1e3:g}ms"
    return f"{seconds / 60:g}m" if seconds % 60 == 0 else f"{seconds:g}s"


def format_size(size: int) -> str:
    """The largest binary unit that divides ``size``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % scale == 0:
            return f"{size // scale}{unit}"
    return str(size)


Duration = Annotated[float, BeforeValidator(parse_duration), PlainSerializer(format_duration, when_used="json")]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(format_size, when_used="json")]
