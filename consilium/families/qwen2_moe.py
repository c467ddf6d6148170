"""Qwen2-MoE (Qwen team 2024, "Qwen1.5-MoE"): a shared expert with a gate of its own, and biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, optional_size, require_size
from consilium.families.layer_types import sliding_windows
from consilium.families.names import MLP, Names, ffn, separate_or_fused
from consilium.families.qwen3_moe import routed_layers
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(
    router=MLP + ".gate.weight",
    experts=separate_or_fused(MLP),
    shared=ffn(MLP + ".shared_expert"),
    shared_gate=MLP + ".shared_expert_gate.weight",
    dense=ffn(MLP),
)

# What transformers' Qwen2MoeConfig takes for a key that config.json leaves out.
DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "sliding_window": 4096, "max_window_layers": 28}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a Qwen2MoeForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    layers = common["num_layers"]
    moe_layers = routed_layers(config, layers)
    window = optional_size(config, "sliding_window") if optional(config, "use_sliding_window", False) else None
    # Every other of the first layers, where the layers' types are not stated.
    most = optional(config, "max_window_layers", 28)
    slides = tuple(window is not None and layer % 2 == 0 and layer < most for layer in range(layers))
    return ModelConfig(
        family="qwen2_moe",
        num_experts=require_size(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "moe_intermediate_size"),
        moe_layers=moe_layers,
        dense_size=0 if all(moe_layers) else require_size(config, "intermediate_size"),
        gate=GateRule(normalize=optional(config, "norm_topk_prob", False)),
        shared_size=require_size(config, "shared_expert_intermediate_size"),
        shared_gate=True,
        attention_bias=optional(config, "qkv_bias", True),
        output_bias=False,
        sliding_windows=sliding_windows(config, window, slides),
        **common,
    )
