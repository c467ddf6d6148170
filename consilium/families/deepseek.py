"""DeepSeekMoE (Dai et al. 2024, "DeepSeekMoE", the 16B): Llama's attention, shared experts, first layers dense.

Its checkpoints bring their own code instead of being in transformers; the defaults are those of that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, optional_size, require_size
from consilium.errors import CheckpointError
from consilium.families.names import MLP, Names, ffn, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(
    router=MLP + ".gate.weight",
    experts=separate_or_fused(MLP),
    shared=ffn(MLP + ".shared_experts"),
    dense=ffn(MLP),
)

DEFAULTS = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "bos_token_id": 100000, "eos_token_id": 100001}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a DeepseekForCausalLM."""
    config = {**DEFAULTS, **config}
    if optional(config, "scoring_func", "softmax") != "softmax":
        raise CheckpointError(
            f"config.json: scoring_func {config['scoring_func']!r} is not supported; supported: softmax"
        )
    common = parse_common(config)
    moe_layers = first_dense(config, common["num_layers"])
    return ModelConfig(
        family="deepseek",
        gate=GateRule(normalize=optional(config, "norm_topk_prob", False)),
        attention_bias=optional(config, "attention_bias", False),
        **experts_of(config, moe_layers),
        **common,
    )


def first_dense(config: Mapping[str, Any], layers: int, default: int = 0) -> tuple[bool, ...]:
    """Which layers route: none of the first ones, then one of so many."""
    first = optional(config, "first_k_dense_replace", default)
    step = optional_size(config, "moe_layer_freq") or 1
    return tuple(layer >= first and layer % step == 0 for layer in range(layers))


def experts_of(config: Mapping[str, Any], moe_layers: tuple[bool, ...]) -> dict[str, Any]:
    """The experts' fields of ModelConfig, as all DeepSeek families and GLM state them."""
    size = require_size(config, "moe_intermediate_size")
    shared = optional(config, "n_shared_experts", 0)
    return {
        "num_experts": require_size(
            config, "n_routed_experts" if "n_routed_experts" in config else "num_local_experts"
        ),
        "top_k": require_size(config, "num_experts_per_tok"),
        "expert_size": size,
        "shared_size": size * shared,
        "moe_layers": moe_layers,
        "dense_size": 0 if all(moe_layers) else require_size(config, "intermediate_size"),
    }
