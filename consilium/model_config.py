"""What a checkpoint's config.json says, in one form for every family. Free of torch: the HTTP process reads it too.

Letters: D hidden size, E experts in a layer, K experts per token, F expert FFN size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from consilium.errors import CheckpointError

SUPPORTED_ACTIVATIONS = ("silu",)
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

T = TypeVar("T")


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


def require(config: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """``config[key]``, checked to be a ``kind``. Raises CheckpointError that names the key."""
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = "nothing" if value is None else repr(value)
        raise CheckpointError(f"config.json: {key} must be {kind.__name__}, found {found}")
    return value


def optional(config: Mapping[str, Any], key: str, default: T) -> T:
    """``config[key]`` of the default's type, or the default where it is absent or null."""
    return default if config.get(key) is None else require(config, key, type(default))


def parse_rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> RopeConfig:
    """Rope in both dialects: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (5).

    Raises CheckpointError for a rope type that is not supported, with the list of those that are.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or default_theta
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope type {rope_type!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    if not isinstance(theta, int | float) or theta <= 0:
        raise CheckpointError(f"config.json: rope_theta must be a positive number, found {theta!r}")
    return RopeConfig(float(theta), rope_type, scaling)


def parse_common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that every family states under the same names."""
    activation = config.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        raise CheckpointError(
            f"config.json: hidden_act {activation!r} is not supported; supported: {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    hidden, heads = require(config, "hidden_size", int), require(config, "num_attention_heads", int)
    eos = config.get("eos_token_id")
    return {
        "vocab_size": require(config, "vocab_size", int),
        "hidden_size": hidden,
        "num_layers": require(config, "num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": optional(config, "num_key_value_heads", heads),
        "head_dim": optional(config, "head_dim", hidden // heads),
        "max_position": require(config, "max_position_embeddings", int),
        "rope": parse_rope(config),
        "rms_norm_eps": optional(config, "rms_norm_eps", 1e-6),
        "tie_embeddings": optional(config, "tie_word_embeddings", False),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        "bos_token_id": config.get("bos_token_id"),
    }


def check(config: ModelConfig) -> ModelConfig:
    """The same config, once its numbers are seen to fit together. Raises CheckpointError."""
    positive = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position")
    for name in (*positive, "num_experts", "top_k", "expert_size"):
        if getattr(config, name) <= 0:
            raise CheckpointError(f"config.json: {name} must be positive, found {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"config.json: {config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads evenly"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"config.json: head_dim must be even for rotary embedding, found {config.head_dim}")
    if config.top_k > config.num_experts:
        raise CheckpointError(f"config.json: {config.top_k} experts per token of only {config.num_experts}")
    return config
