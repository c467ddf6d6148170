"""Checked values out of a parsed config.json: whatever stands there, the error is a CheckpointError with the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from consilium.errors import CheckpointError

# Sizes above this are damage, not models; checked before anything is made as long as they say.
MAX_SIZE = 2**31 - 1

T = TypeVar("T")


def require(config: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """``config[key]``, checked to be a ``kind``. Raises CheckpointError that names the key."""
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= MAX_SIZE else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = "nothing" if value is None else repr(value)[:80]
        raise CheckpointError(f"config.json: {key} must be {kind.__name__}, found {found}")
    return value


def optional(config: Mapping[str, Any], key: str, default: T) -> T:
    """``config[key]`` of the default's type, or the default where it is absent or null."""
    return default if config.get(key) is None else require(config, key, type(default))


def require_size(config: Mapping[str, Any], key: str, most: int = MAX_SIZE) -> int:
    """``config[key]``, checked to be an int from 1 to ``most``."""
    value = require(config, key, int)
    if not 1 <= value <= most:
        raise CheckpointError(f"config.json: {key} must be from 1 to {most}, found {value}")
    return value


def optional_size(config: Mapping[str, Any], key: str) -> int | None:
    """A size that may be absent or null."""
    return None if config.get(key) is None else require_size(config, key)


def require_positive(config: Mapping[str, Any], key: str) -> float:
    """``config[key]``, checked to be a finite number above 0."""
    value = require(config, key, float)
    if not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} must be a positive number, found {value}")
    return value


def int_list(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The ints of a list, a lone int as a list of one, nothing where it is absent or null."""
    value = config.get(key)
    items = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise CheckpointError(f"config.json: {key} must hold ints, found {repr(value)[:80]}")
    return tuple(items)
