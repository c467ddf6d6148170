"""What a checkpoint's config.json says, in one form for every family. Free of torch: the HTTP process reads it too.

Letters: D hidden size, E experts in a layer, K experts per token, F expert FFN size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consilium.config_json import int_list, optional, optional_size, require_positive, require_size
from consilium.errors import CheckpointError

SUPPORTED_ACTIVATIONS = ("silu",)
# The rope types, each with the parameters it cannot do without.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL_ROPE_PARAMETERS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are scaled to longer contexts."""

    theta: float
    rope_type: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)  # the parameters of rope_type, as config.json names them


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only Mixture-of-Experts transformer."""

    family: str
    vocab_size: int
    hidden_size: int  # D
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_embeddings: bool
    num_experts: int  # E
    top_k: int  # K
    expert_size: int  # F
    moe_layers: tuple[bool, ...]  # [L] which layers route; the others have one dense FFN
    dense_size: int = 0  # FFN size of the layers that do not route
    normalize_top_k: bool = True  # gate weights of the K chosen experts sum to one
    qk_norm: bool = False
    attention_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # [L] most positions a query sees, itself included
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def expert_layers(self) -> list[int]:
        """The layers that route, ascending."""
        return [layer for layer, routes in enumerate(self.moe_layers) if routes]


def parse_rope(config: Mapping[str, Any], max_position: int) -> RopeConfig:
    """Rope in both dialects: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (5).

    As in transformers, `rope_scaling` comes first, and an original context that is not stated is ``max_position``.
    Raises CheckpointError for a rope type that is not supported, with the list of those that are.
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
    rope = RopeConfig(_rope_theta(config, stated), rope_type, scaling)
    _check_rope(rope, config)
    return rope


def _rope_theta(config: Mapping[str, Any], stated: Mapping[str, Any]) -> float:
    theta = require_positive(config if stated.get("rope_theta") is None else stated, "rope_theta")
    if theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be above 1, found {theta}")
    return theta


def _check_rope(rope: RopeConfig, config: Mapping[str, Any]) -> None:
    if rope.rope_type == "llama3" and rope.scaling["high_freq_factor"] <= rope.scaling["low_freq_factor"]:
        raise CheckpointError("config.json: high_freq_factor must be above low_freq_factor")
    if any(isinstance(value, Mapping) for value in rope.scaling.values()):
        raise CheckpointError(
            "config.json: rope parameters per layer type are not supported; one set for all layers is"
        )
    for rotated in (config.get("partial_rotary_factor"), rope.scaling.get("partial_rotary_factor")):
        if rotated not in (None, 1):
            raise CheckpointError(f"config.json: partial_rotary_factor {rotated!r} is not supported; supported: 1")


def parse_common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that every family states under the same names."""
    activation = config.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act {activation!r} is not supported; supported: {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    hidden, heads = require_size(config, "hidden_size"), require_size(config, "num_attention_heads")
    head_dim = optional_size(config, "head_dim")
    if head_dim is None and hidden % heads:
        raise CheckpointError(
            f"config.json: {heads} num_attention_heads do not divide hidden_size {hidden}, and no head_dim is given"
        )
    max_position = require_size(config, "max_position_embeddings")
    bos = int_list(config, "bos_token_id")
    return {
        "vocab_size": require_size(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": require_size(config, "num_hidden_layers", MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": optional_size(config, "num_key_value_heads") or heads,
        "head_dim": head_dim or hidden // heads,
        "max_position": max_position,
        "rope": parse_rope(config, max_position),
        "rms_norm_eps": require_positive(config, "rms_norm_eps"),
        "tie_embeddings": optional(config, "tie_word_embeddings", False),
        "eos_token_ids": int_list(config, "eos_token_id"),
        "bos_token_id": bos[0] if bos else None,
    }


def check(config: ModelConfig) -> ModelConfig:
    """The same config, once its numbers are seen to fit together. Raises CheckpointError."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"config.json: {config.num_heads} num_attention_heads cannot share {config.num_kv_heads} "
            "num_key_value_heads evenly"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"config.json: head_dim must be even for rotary embedding, found {config.head_dim}")
    if config.top_k > config.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {config.top_k}, of only {config.num_experts} experts"
        )
    if not any(config.moe_layers):
        raise CheckpointError("config.json: no layer routes to experts; a dense model is not served")
    return config
