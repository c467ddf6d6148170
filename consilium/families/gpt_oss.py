"""gpt-oss (OpenAI 2025): attention sinks, every other layer slides, biases everywhere, a clamped activation.

The published experts are in MXFP4 (consilium.formats).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, optional_size, require_positive, require_size
from consilium.families.layer_types import sliding_windows
from consilium.families.names import MLP, ExpertLayout, Names
from consilium.gate_rule import GateRule
from consilium.model_config import ClampedSwiGLU, ModelConfig, parse_common

NAMES = Names(
    router=MLP + ".router.weight",
    router_bias=MLP + ".router.bias",
    experts=(
        ExpertLayout(
            gate_up=MLP + ".experts.gate_up_proj",
            down=MLP + ".experts.down_proj",
            transposed=True,
            gate_up_bias=MLP + ".experts.gate_up_proj_bias",
            down_bias=MLP + ".experts.down_proj_bias",
        ),
    ),
)

# What transformers' GptOssConfig takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 150000.0,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a GptOssForCausalLM."""
    config = {**DEFAULTS, **config}
    if not config.get("rope_scaling") and not config.get("rope_parameters"):
        config["rope_scaling"] = ROPE
    common = parse_common(config)
    every_other = [layer % 2 == 0 for layer in range(common["num_layers"])]
    return ModelConfig(
        family="gpt_oss",
        num_experts=require_size(config, "num_local_experts" if "num_local_experts" in config else "num_experts"),
        top_k=require_size(config, "num_experts_per_tok" if "num_experts_per_tok" in config else "experts_per_token"),
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        gate=GateRule(scores="top_k_softmax", logit_bias=True),
        activation=ClampedSwiGLU(require_positive(config, "swiglu_alpha"), require_positive(config, "swiglu_limit")),
        expert_bias=True,
        attention_bias=optional(config, "attention_bias", True),
        sinks=True,
        sliding_windows=sliding_windows(config, optional_size(config, "sliding_window"), every_other),
        **common,
    )
