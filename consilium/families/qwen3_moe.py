"""Qwen3-MoE (Qwen team 2025, "Qwen3 Technical Report"): RMS-normed queries and keys, some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import int_list, optional, optional_size, require_size
from consilium.families.names import MLP, ExpertLayout, Names, ffn, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(
    router=MLP + ".gate.weight",
    experts=(
        *separate_or_fused(MLP),
        ExpertLayout(gate_up=MLP + ".input_linear.weight", down=MLP + ".output_linear.weight"),
    ),
    dense=ffn(MLP),
)


# What transformers' Qwen3MoeConfig takes for a key that config.json leaves out.
DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096}


def routed_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers route, as the Qwen families state it: every so many, but for those that are listed."""
    step = optional_size(config, "decoder_sparse_step") or 1
    dense_layers = set(int_list(config, "mlp_only_layers"))
    return tuple(layer not in dense_layers and (layer + 1) % step == 0 for layer in range(layers))


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a Qwen3MoeForCausalLM.

    A sliding window is that of every layer: the model code reads neither `max_window_layers` nor `layer_types`.
    """
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    layers = common["num_layers"]
    moe_layers = routed_layers(config, layers)
    window = optional_size(config, "sliding_window") if optional(config, "use_sliding_window", False) else None
    return ModelConfig(
        family="qwen3_moe",
        # transformers 5 writes the one as the other
        num_experts=require_size(config, "num_local_experts" if "num_local_experts" in config else "num_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "moe_intermediate_size"),
        moe_layers=moe_layers,
        dense_size=0 if all(moe_layers) else require_size(config, "intermediate_size"),
        gate=GateRule(normalize=optional(config, "norm_topk_prob", False)),
        qk_norm=True,
        attention_bias=optional(config, "attention_bias", False),
        sliding_windows=(window,) * layers,
        **common,
    )
