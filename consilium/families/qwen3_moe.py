"""Qwen3-MoE (Qwen team 2025, "Qwen3 Technical Report"): RMS-normed queries and keys, some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import int_list, optional, optional_size, require_size
from consilium.families.names import ExpertLayout, Names
from consilium.model_config import ModelConfig, parse_common

_MLP = "model.layers.{layer}.mlp"

NAMES = Names(
    router=_MLP + ".gate.weight",
    experts=(
        ExpertLayout(
            gate=_MLP + ".experts.{expert}.gate_proj.weight",
            up=_MLP + ".experts.{expert}.up_proj.weight",
            down=_MLP + ".experts.{expert}.down_proj.weight",
        ),
        ExpertLayout(gate_up=_MLP + ".experts.gate_up_proj", down=_MLP + ".experts.down_proj"),
        ExpertLayout(gate_up=_MLP + ".input_linear.weight", down=_MLP + ".output_linear.weight"),
    ),
    dense=ExpertLayout(gate=_MLP + ".gate_proj.weight", up=_MLP + ".up_proj.weight", down=_MLP + ".down_proj.weight"),
)


# What transformers' Qwen3MoeConfig takes for a key that config.json leaves out.
DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "sliding_window": 4096}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a Qwen3MoeForCausalLM.

    A sliding window is that of every layer: the model code reads neither `max_window_layers` nor `layer_types`.
    """
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    layers = common["num_layers"]
    step = optional_size(config, "decoder_sparse_step") or 1
    dense_layers = set(int_list(config, "mlp_only_layers"))
    moe_layers = tuple(layer not in dense_layers and (layer + 1) % step == 0 for layer in range(layers))
    window = optional_size(config, "sliding_window") if optional(config, "use_sliding_window", False) else None
    return ModelConfig(
        family="qwen3_moe",
        # transformers 5 writes the one as the other
        num_experts=require_size(config, "num_local_experts" if "num_local_experts" in config else "num_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "moe_intermediate_size"),
        moe_layers=moe_layers,
        dense_size=0 if all(moe_layers) else require_size(config, "intermediate_size"),
        normalize_top_k=optional(config, "norm_topk_prob", False),
        qk_norm=True,
        attention_bias=optional(config, "attention_bias", False),
        sliding_windows=(window,) * layers,
        **common,
    )
