"""Granite 3 MoE (IBM 2024): Mixtral with softmax over the chosen logits, and multipliers in four places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, require_positive, require_size
from consilium.families.names import ExpertLayout, Names
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

_MOE = "model.layers.{layer}.block_sparse_moe"

NAMES = Names(
    router=_MOE + ".router.layer.weight",
    experts=(ExpertLayout(gate_up=_MOE + ".input_linear.weight", down=_MOE + ".output_linear.weight"),),
)

# What transformers' GraniteMoeConfig takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a GraniteMoeForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    residual = require_positive(config, "residual_multiplier")
    return ModelConfig(
        family="granitemoe",
        num_experts=require_size(config, "num_local_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        gate=GateRule(scores="top_k_softmax", scaling=residual),  # of what the experts add to the residual stream
        residual_scale=residual,
        attention_scale=require_positive(config, "attention_multiplier"),
        attention_bias=optional(config, "attention_bias", False),
        embedding_scale=require_positive(config, "embedding_multiplier"),
        logit_divisor=require_positive(config, "logits_scaling"),
        **common,
    )
