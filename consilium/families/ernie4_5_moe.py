"""ERNIE 4.5 MoE (Baidu 2025): a softmax gate whose choice is corrected by a bias, shared experts, first layers dense.

Only the text models; predicting several tokens at once (`mtp`) is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from consilium.config_json import optional, require, require_positive, require_size
from consilium.errors import CheckpointError
from consilium.families.names import MLP, Names, ffn, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(
    router=MLP + ".gate.weight",
    correction=MLP + ".moe_statics.e_score_correction_bias",
    experts=separate_or_fused(MLP),
    shared=ffn(MLP + ".shared_experts"),
    dense=ffn(MLP),
)

# What transformers' Ernie4_5_MoeConfig takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of an Ernie4_5_MoeForCausalLM."""
    config = {**DEFAULTS, **config}
    if optional(config, "use_bias", False):
        raise CheckpointError("config.json: use_bias is not supported; supported: false")
    common = parse_common(config)
    common["rope"] = replace(common["rope"], interleaved=True)
    layers, size = common["num_layers"], require_size(config, "moe_intermediate_size")
    first, last = require(config, "moe_layer_start_index", int), require(config, "moe_layer_end_index", int)
    last, step = layers - 1 if last == -1 else last, require_size(config, "moe_layer_interval")
    moe_layers = tuple(first <= layer <= last and (layer + 1) % step == 0 for layer in range(layers))
    return ModelConfig(
        family="ernie4_5_moe",
        num_experts=require_size(config, "moe_num_experts"),
        top_k=require_size(config, "moe_k"),
        expert_size=size,
        moe_layers=moe_layers,
        dense_size=0 if all(moe_layers) else require_size(config, "intermediate_size"),
        gate=GateRule(correction=True, least_sum=require_positive(config, "moe_norm_min")),
        shared_size=size * optional(config, "moe_num_shared_experts", 0),
        **common,
    )
