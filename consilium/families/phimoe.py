"""Phi-3.5-MoE (Abdin et al. 2024; Liu et al. 2024, "GRIN"): layer norms, biases, and the sparsemixer gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, optional_size, require_positive, require_size
from consilium.errors import CheckpointError
from consilium.families.names import ExpertLayout, Names
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common
from consilium.rope_config import RopeConfig

_MOE = "model.layers.{layer}.block_sparse_moe"

NAMES = Names(
    router=_MOE + ".gate.weight",
    experts=(
        ExpertLayout(
            gate=_MOE + ".experts.{expert}.w1.weight",
            up=_MOE + ".experts.{expert}.w3.weight",
            down=_MOE + ".experts.{expert}.w2.weight",
        ),
    ),
)

# What transformers' PhimoeConfig takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_jitter_noise": 0.01,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a PhimoeForCausalLM.

    With longrope only the original context is served: beyond it all positions would have other angles.
    """
    config = {**DEFAULTS, **config}
    place = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    stated: dict[str, Any] = optional(config, place, {})
    long = (stated.get("rope_type") or stated.get("type")) == "longrope"
    common = parse_common(
        {**config, "rope_scaling": None, "rope_parameters": None, **_theta(stated)} if long else config
    )
    if long:
        common |= _long_rope({**config, **stated}, common)
    if require_size(config, "num_experts_per_tok") != 2:
        raise CheckpointError("config.json: num_experts_per_tok must be 2: sparsemixer chooses two experts")
    layers = common["num_layers"]
    return ModelConfig(
        family="phimoe",
        num_experts=require_size(config, "num_local_experts"),
        top_k=2,
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * layers,
        gate=GateRule(scores="sparsemixer", jitter=require_positive(config, "router_jitter_noise")),
        attention_bias=optional(config, "attention_bias", False),
        layer_norm=True,
        head_bias=optional(config, "lm_head_bias", False),
        sliding_windows=(optional_size(config, "sliding_window"),) * layers,
        **common,
    )


def _theta(stated: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_theta": stated["rope_theta"]} if "rope_theta" in stated else {}


def _long_rope(config: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024) within the original context: the short factors."""
    factors, rope = config.get("short_factor"), common["rope"]
    if not isinstance(factors, list) or len(factors) != common["head_dim"] // 2:
        raise CheckpointError(f"config.json: short_factor must be a list of {common['head_dim'] // 2} numbers")
    checked = [require_positive({"short_factor": each}, "short_factor") for each in factors]
    scaling = {"short_factor": checked, "short_mscale": require_positive(config, "short_mscale")}
    original = require_size(config, "original_max_position_embeddings")
    return {
        "rope": RopeConfig(rope.theta, "longrope", scaling),
        "max_position": min(original, common["max_position"]),
    }
