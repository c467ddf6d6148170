"""Rotary position embedding (Su et al. 2021), with the context extensions that checkpoints state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.model_config import ModelConfig

CHUNK = 1024  # positions computed at a time


class Rope:
    """Cosines and sines by position; ``d`` elements of a head are rotated, paired as (i, i + d/2)."""

    def __init__(self, config: ModelConfig) -> None:
        rope = config.rope
        size = config.rotated_size
        inverse = rope.theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)  # [d/2]
        scale = 1.0
        if rope.rope_type == "linear":
            inverse = inverse / _number(rope.scaling, "factor")
        elif rope.rope_type == "llama3":
            inverse = _llama3(inverse, rope.scaling)
        elif rope.rope_type == "yarn":
            inverse, scale = _yarn(inverse, rope.theta, config.max_position, rope.scaling)
        elif rope.rope_type == "longrope":
            inverse = inverse / torch.tensor(rope.scaling["short_factor"])
            scale = _number(rope.scaling, "short_mscale")
        self._inverse, self._scale = inverse, scale
        self._cos = self._sin = inverse.new_empty(0, len(inverse))  # [positions so far, d/2]

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, d/2] float32 for ``positions`` [T], the same for a position whatever the others are."""
        while len(self._cos) <= int(positions.max()):
            self._grow()
        return self._cos[positions], self._sin[positions]

    def _grow(self) -> None:
        """The next chunk. The angles are float32 as in transformers; their functions float64, rounded once."""
        first = len(self._cos)
        angles = torch.arange(first, first + CHUNK, dtype=torch.float32)[:, None] * self._inverse  # [CHUNK, d/2]
        exact = angles.double()
        self._cos = torch.cat((self._cos, exact.cos().float() * self._scale))
        self._sin = torch.cat((self._sin, exact.sin().float() * self._scale))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [T, H, d]; the gateway's kernel does the same (consilium.kernels.attention)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, d/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _llama3(inverse: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by the factor, short ones kept, a smooth ramp between."""
    factor, original = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = original * inverse / (2 * math.pi)  # [d/2] full turns within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / factor + kept * inverse


def _yarn(inverse: Tensor, theta: float, max_position: int, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, and sharpen the attention."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings", float(max_position))
    pairs = inverse.numel()

    def dimension_of(turns: float) -> float:  # the pair that makes so many turns within the original context
        return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension_of(_number(scaling, "beta_fast", 32.0))
    high = dimension_of(_number(scaling, "beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - low) / ((high - low) or 0.001)
    interpolated = ramp.clamp(0, 1)  # [d/2] 0 keeps the frequency, 1 divides it by the factor
    return inverse / factor * interpolated + inverse * (1 - interpolated), _yarn_attention(factor, scaling)


def _yarn_attention(factor: float, scaling: Mapping[str, Any]) -> float:
    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(_number(scaling, "mscale")) / temperature(_number(scaling, "mscale_all_dim"))
    return temperature(1.0)


def _number(scaling: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"config.json: the rope scaling needs a positive {key}, found {value!r}")
    return float(value)
