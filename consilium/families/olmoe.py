"""OLMoE (Muennighoff et al. 2024): queries and keys are normed over all heads together, and may be clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, require_positive, require_size
from consilium.families.names import MLP, Names, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(router=MLP + ".gate.weight", experts=separate_or_fused(MLP))

# What transformers' OlmoeConfig takes for a key that config.json leaves out.
DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "eos_token_id": 50279}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of an OlmoeForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    return ModelConfig(
        family="olmoe",
        num_experts=require_size(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        gate=GateRule(normalize=optional(config, "norm_topk_prob", False)),
        qk_norm=True,
        qk_norm_whole=True,
        clip_qkv=None if config.get("clip_qkv") is None else require_positive(config, "clip_qkv"),
        attention_bias=optional(config, "attention_bias", False),
        **common,
    )
