"""DeepSeek-V2 (DeepSeek-AI 2024): multi-head latent attention, and a gate that may be limited to groups of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, optional_size, require_positive, require_size
from consilium.errors import CheckpointError
from consilium.families.deepseek import experts_of, first_dense
from consilium.families.names import MLP, Names, ffn, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import LatentConfig, ModelConfig, parse_common
from consilium.rope_config import RopeConfig

NAMES = Names(
    router=MLP + ".gate.weight",
    experts=separate_or_fused(MLP),
    shared=ffn(MLP + ".shared_experts"),
    dense=ffn(MLP),
)

# What transformers' DeepseekV2Config takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_shared_experts": 2,
    "topk_method": "greedy",
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a DeepseekV2ForCausalLM."""
    config = {**DEFAULTS, **config}
    method, scaling = (
        config["topk_method"],
        require_positive({"routed_scaling_factor": 1.0, **config}, "routed_scaling_factor"),
    )
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(
            f"config.json: topk_method {method!r} is not supported; supported: greedy, group_limited_greedy"
        )
    if optional(config, "norm_topk_prob", False):
        raise CheckpointError(
            "config.json: norm_topk_prob is not supported for deepseek_v2: DeepSeek's own code and transformers differ"
        )
    refuse_biased_ffn(config)
    common = parse_latent(config)
    rule = GateRule(normalize=False, scaling=scaling)
    if method == "group_limited_greedy":
        groups, kept = require_size(config, "n_group"), require_size(config, "topk_group")
        rule = GateRule(normalize=False, scaling=scaling, groups=groups, top_groups=kept)
    moe_layers = first_dense(config, common["num_layers"])
    return ModelConfig(family="deepseek_v2", gate=rule, **experts_of(config, moe_layers), **common)


def parse_latent(config: Mapping[str, Any], *, interleaved: bool = True) -> dict[str, Any]:
    """The common fields, and those of multi-head latent attention: one key-value head, whose values are the latents."""
    common = parse_common({**config, "head_dim": require_size(config, "qk_rope_head_dim")})
    query_rank = optional_size(config, "q_lora_rank")
    latent = LatentConfig(
        rank=require_size(config, "kv_lora_rank"),
        query_rank=query_rank,
        plain_size=require_size(config, "qk_nope_head_dim"),
        rotated_size=require_size(config, "qk_rope_head_dim"),
        value_size=require_size(config, "v_head_dim"),
    )
    rope: RopeConfig = common["rope"]
    common |= {
        "num_kv_heads": 1,
        "head_dim": latent.rotated_size + latent.rank,
        "latent": latent,
        "attention_bias": optional(config, "attention_bias", False),
        "attention_scale": _sharpness(rope) ** 2 / math.sqrt(latent.plain_size + latent.rotated_size),
        "rope": RopeConfig(rope.theta, rope.rope_type, rope.scaling, interleaved=interleaved),
    }
    return common


def refuse_biased_ffn(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for FFNs with biases, which no published model of these families has."""
    if optional(config, "mlp_bias", False):
        raise CheckpointError("config.json: mlp_bias is not supported; supported: false")


def _sharpness(rope: RopeConfig) -> float:
    """By what YaRN makes queries and keys larger, where `mscale_all_dim` says that all their elements are."""
    factor, all_dim = rope.scaling.get("factor", 1.0), rope.scaling.get("mscale_all_dim")
    return 0.1 * all_dim * math.log(factor) + 1.0 if all_dim and rope.rope_type != "default" and factor > 1 else 1.0
