"""Mixtral (Jiang et al. 2024, "Mixtral of Experts"): every layer routes, softmax over the K chosen logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional_size, require_size
from consilium.families.names import ExpertLayout, Names
from consilium.model_config import ModelConfig, parse_common

_MOE = "model.layers.{layer}.block_sparse_moe"

NAMES = Names(
    router=_MOE + ".gate.weight",
    experts=(
        ExpertLayout(
            gate=_MOE + ".experts.{expert}.w1.weight",
            up=_MOE + ".experts.{expert}.w3.weight",
            down=_MOE + ".experts.{expert}.w2.weight",
        ),
        ExpertLayout(gate_up=_MOE + ".experts.gate_up_proj", down=_MOE + ".experts.down_proj"),
        ExpertLayout(gate_up=_MOE + ".input_linear.weight", down=_MOE + ".output_linear.weight"),
    ),
    other_spelling=(".block_sparse_moe.", ".mlp."),  # transformers 5, where it saves tensors as it holds them
)


# What transformers' MixtralConfig takes for a key that config.json leaves out.
DEFAULTS = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a MixtralForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_common(config)
    layers = common["num_layers"]
    return ModelConfig(
        family="mixtral",
        num_experts=require_size(config, "num_local_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * layers,
        sliding_windows=(optional_size(config, "sliding_window"),) * layers,
        **common,
    )
