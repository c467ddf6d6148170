"""Qwen3-MoE (Qwen team 2025, "Qwen3 Technical Report"): RMS-normed queries and keys, some layers may be dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.errors import CheckpointError
from consilium.families.names import ExpertLayout, Names
from consilium.model_config import ModelConfig, optional, parse_common, require

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


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a Qwen3MoeForCausalLM."""
    common = parse_common(config)
    layers = common["num_layers"]
    step = optional(config, "decoder_sparse_step", 1)
    if step < 1:
        raise CheckpointError(f"config.json: decoder_sparse_step must be at least 1, found {step}")
    dense_layers: list[int] = optional(config, "mlp_only_layers", [])
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    return ModelConfig(
        family="qwen3_moe",
        # transformers 5 writes the one as the other
        num_experts=require(config, "num_local_experts" if "num_local_experts" in config else "num_experts", int),
        top_k=require(config, "num_experts_per_tok", int),
        expert_size=require(config, "moe_intermediate_size", int),
        moe_layers=tuple(layer not in dense_layers and (layer + 1) % step == 0 for layer in range(layers)),
        dense_size=require(config, "intermediate_size", int),
        normalize_top_k=optional(config, "norm_topk_prob", False),
        qk_norm=True,
        attention_bias=optional(config, "attention_bias", False),
        sliding_windows=(window,) * layers,
        **common,
    )
