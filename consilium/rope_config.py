"""What config.json says of rotary position embedding, in both dialects. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consilium.config_json import optional, require_positive
from consilium.errors import CheckpointError

# The rope types, each with the parameters it cannot do without.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL_ROPE_PARAMETERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are scaled to longer contexts."""

    theta: float
    rope_type: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)  # the parameters of rope_type, as config.json names them
    fraction: float = 1.0  # of a head's elements that are rotated: the first ones
    interleaved: bool = False  # pairs are neighbours in the checkpoint, else (i, i + r/2)


def parse_rope(config: Mapping[str, Any], max_position: int, *, partial: bool = False) -> RopeConfig:
    """Rope in both dialects: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (5).

    As in transformers, `rope_scaling` comes first, and an original context that is not stated is ``max_position``.
    Families with ``partial`` may rotate a part of each head. Raises CheckpointError for a rope type that is not
    supported, with the list of those that are.
    """
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    stated: dict[str, Any] = optional(config, place, {})
    rope_type = stated.get("rope_type") or stated.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_PARAMETERS:
        raise CheckpointError(
            f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_PARAMETERS)}"
        )
    scaling = {key: value for key, value in stated.items() if key not in ("rope_theta", "rope_type", "type")}
    needed = ROPE_PARAMETERS[rope_type]
    if "original_max_position_embeddings" in needed:
        scaling.setdefault("original_max_position_embeddings", max_position)
    named = {f"{place}.{key}": value for key, value in scaling.items()}  # as errors name them
    for key in (*needed, *(key for key in OPTIONAL_ROPE_PARAMETERS if scaling.get(key) is not None)):
        require_positive(named, f"{place}.{key}")
    rope = RopeConfig(_rope_theta(config, stated), rope_type, scaling, _fraction(config, scaling, partial=partial))
    _check_rope(rope)
    return rope


def _fraction(config: Mapping[str, Any], scaling: Mapping[str, Any], *, partial: bool) -> float:
    """What part of each head is rotated: as stated with the rope parameters, else with the model's."""
    stated = config if scaling.get("partial_rotary_factor") is None else scaling
    if stated.get("partial_rotary_factor") is None:
        return 1.0
    fraction = require_positive(stated, "partial_rotary_factor")
    if fraction > 1 or (fraction < 1 and not partial):
        raise CheckpointError(
            f"config.json: partial_rotary_factor {fraction!r} is not supported; supported: "
            + ("up to 1" if partial else "1")
        )
    return fraction


def _rope_theta(config: Mapping[str, Any], stated: Mapping[str, Any]) -> float:
    theta = require_positive(config if stated.get("rope_theta") is None else stated, "rope_theta")
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be above 1, found {theta}")
    return theta


def _check_rope(rope: RopeConfig) -> None:
    if rope.rope_type == "llama3" and rope.scaling["high_freq_factor"] <= rope.scaling["low_freq_factor"]:
        raise CheckpointError("config.json: high_freq_factor must be above low_freq_factor")
    if any(isinstance(value, Mapping) for value in rope.scaling.values()):
        raise CheckpointError(
            "config.json: rope parameters per layer type are not supported; one set for all layers is"
        )
