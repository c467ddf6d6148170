"""Which layers and experts a worker holds, as written by its operator: ``all``, ``3``, ``0-3,7``."""

from __future__ import annotations

import re

from consilium.errors import ConfigError
from consilium.model_config import ModelConfig

_PART = re.compile(r"(\d+)(?:-(\d+))?")


def select_layers(text: str, model: ModelConfig) -> list[int]:
    """The chosen layers that route, ascending; dense layers within a range are left out. Raises ConfigError."""
    chosen = parse_selection(text, "worker.layers", model.num_layers)
    layers = [layer for layer in chosen if model.moe_layers[layer]]
    if not layers:
        raise ConfigError(f"worker.layers: none of {text} has experts; layers that have: {model.expert_layers()}")
    return layers


def select_experts(text: str, model: ModelConfig) -> list[int]:
    """The chosen experts of every chosen layer, ascending. Raises ConfigError."""
    return parse_selection(text, "worker.experts", model.num_experts)


def parse_selection(text: str, key: str, count: int) -> list[int]:
    """The numbers below ``count`` that ``text`` names, ascending. Raises ConfigError that names ``key``."""
    if text.strip() == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{key}: {part.strip()!r} is not understood; write all, or for example 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise ConfigError(f"{key}: {part.strip()!r} is out of range; the model has 0-{count - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)
