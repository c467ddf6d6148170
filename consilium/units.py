"""Durations and sizes as people write them: ``500ms``, ``2s``, ``64MiB``, bare numbers, also as strings."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_DECIMAL = {unit: Fraction(1000**power) for power, unit in enumerate(("B", "kB", "MB", "GB"))}
_BYTES = _DECIMAL | {unit: Fraction(1024**power) for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_MOST = 2**63 - 1


def _quantity(value: object, units: Mapping[str, Fraction], example: str) -> Fraction:
    """The exact amount of seconds or bytes in ``value``; units are taken in any case."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number with a unit such as {example}")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        scales = {"": Fraction(1)} | {unit.lower(): scale for unit, scale in units.items()}
        if match is None or match[2].lower() not in scales:
            raise ValueError(f"expected a number with a unit such as {example} (units: {', '.join(units)})")
        amount = Fraction(match[1]) * scales[match[2].lower()]
    elif 0 <= value < math.inf:
        amount = Fraction(value)
    else:
        raise ValueError(f"expected a number that is not negative, such as {example}")
    if amount > _MOST:
        raise ValueError(f"the number is too large; expected something like {example}")
    return amount


def parse_duration(value: object) -> float:
    """Seconds in ``value``; a bare number is seconds. Raises ValueError."""
    return float(_quantity(value, _SECONDS, "500ms"))


def parse_size(value: object) -> int:
    """Whole bytes in ``value``; a bare number is bytes. Raises ValueError."""
    return int(_quantity(value, _BYTES, "64MiB"))


def format_duration(seconds: float) -> str:
    """Exact text that :func:`parse_duration` reads back: whole minutes, else seconds, below one milliseconds."""
    shortest = Decimal(repr(seconds))
    if seconds >= 60 and seconds % 60 == 0:
        return f"{int(seconds) // 60}m"
    return f"{_plain(shortest.scaleb(3))}ms" if 0 < seconds < 1 else f"{_plain(shortest)}s"


def format_size(size: int) -> str:
    """The largest binary unit that divides ``size``."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // int(_BYTES[unit])}{unit}"
    return str(size)


def _plain(number: Decimal) -> str:
    """Digits without an exponent and without zeros at the end."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _schema(units: Mapping[str, Fraction], example: str) -> dict[str, Any]:
    pattern = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(units)})?\s*$"
    return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": pattern}], "examples": [example]}


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    WithJsonSchema(_schema(_SECONDS, "500ms")),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, when_used="json"),
    WithJsonSchema(_schema(_BYTES, "64MiB")),
]
