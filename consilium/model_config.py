"""What a checkpoint's config.json says, in one form for every family. Free of torch: the HTTP process reads it too.

Letters: D hidden size, E experts in a layer, K experts per token, F expert FFN size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consilium.config_json import int_list, optional, optional_size, require_positive, require_size
from consilium.errors import CheckpointError
from consilium.gate_rule import GateRule
from consilium.rope_config import RopeConfig, parse_rope

SUPPORTED_ACTIVATIONS = ("silu",)
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """gpt-oss's activation (OpenAI 2025): clamped, with a steeper sigmoid, and one added to what it multiplies."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2"): what is cached is shared by all heads."""

    rank: int  # elements of the latent that every head's keys and values are made from
    query_rank: int | None  # of the queries' own latent; None where queries come from the hidden state
    plain_size: int  # elements of a head's query and key that are not rotated
    rotated_size: int  # elements that are; those of the key are shared by all heads
    value_size: int  # elements of a head's value


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
    gate: GateRule = field(default_factory=GateRule)
    activation: ClampedSwiGLU | None = None  # of experts; None is SiLU
    expert_bias: bool = False  # an expert's three products have biases
    shared_size: int = 0  # FFN size of the shared experts, all of them together
    shared_gate: bool = False  # their output is weighed by a gate of its own
    qk_norm: bool = False  # RMS norm of queries and keys
    qk_norm_whole: bool = False  # over all heads together, not over each
    clip_qkv: float | None = None  # queries, keys and values are clamped to this
    attention_bias: bool = False
    output_bias: bool = True  # where there is attention_bias: the output projection has one, too
    layer_norm: bool = False  # with biases, in place of RMS norm
    head_bias: bool = False
    embedding_scale: float = 1.0
    logit_divisor: float = 1.0
    residual_scale: float = 1.0  # of what attention adds to the residual stream
    attention_scale: float | None = None  # of scores; None is 1/sqrt(d)
    sinks: bool = False  # every head has one more score, without a value
    latent: LatentConfig | None = None
    sliding_windows: tuple[int | None, ...] = ()  # [L] most positions a query sees, itself included
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def rotated_size(self) -> int:
        """Elements of a query or key that are rotated by position: its first ones."""
        return int(self.head_dim * self.rope.fraction) if self.latent is None else self.latent.rotated_size

    @property
    def value_size(self) -> int:
        """Elements of a value as it is cached."""
        return self.head_dim if self.latent is None else self.latent.rank

    @property
    def heads_size(self) -> int:
        """Elements of all heads' outputs together."""
        return self.num_heads * (self.head_dim if self.latent is None else self.latent.value_size)

    @property
    def cached_elements(self) -> int:
        """Elements of keys and values that a token has in the cache, in all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_size)

    def expert_layers(self) -> list[int]:
        """The layers that route, ascending."""
        return [layer for layer, routes in enumerate(self.moe_layers) if routes]


def parse_common(config: Mapping[str, Any], *, partial_rotary: bool = False) -> dict[str, Any]:
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
        "rope": parse_rope(config, max_position, partial=partial_rotary),
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
    if config.rotated_size % 2 or not config.rotated_size:
        raise CheckpointError(
            f"config.json: head_dim must be even for rotary embedding, found {config.head_dim}, of which "
            f"{config.rotated_size} elements are rotated"
        )
    if config.latent is not None and (config.latent.rank % 16 or config.latent.value_size % 16):
        raise CheckpointError(
            f"config.json: kv_lora_rank {config.latent.rank} and v_head_dim {config.latent.value_size} must be "
            "multiples of 16"
        )
    _check_groups(config)
    if config.top_k > config.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok is {config.top_k}, of only {config.num_experts} experts"
        )
    if not any(config.moe_layers):
        raise CheckpointError("config.json: no layer routes to experts; a dense model is not served")
    return config


def _check_groups(config: ModelConfig) -> None:
    rule = config.gate
    size = config.num_experts // rule.groups
    if config.num_experts % rule.groups or rule.top_groups > rule.groups:
        raise CheckpointError(
            f"config.json: {rule.groups} n_group, of which {rule.top_groups} topk_group take part, do not divide "
            f"{config.num_experts} experts evenly"
        )
    if rule.groups > 1 and (config.top_k > rule.top_groups * size or rule.group_members > size):
        raise CheckpointError(
            f"config.json: {rule.top_groups} groups of {size} experts are too few for {config.top_k} experts a token"
        )
