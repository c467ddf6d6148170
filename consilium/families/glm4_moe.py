"""GLM-4.5 (Zhipu AI 2025): DeepSeek-V3's gate over grouped-query attention with partly rotated heads.

The layers for predicting several tokens at once (`num_nextn_predict_layers`) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional
from consilium.families.deepseek import experts_of, first_dense
from consilium.families.deepseek_v3 import NAMES as NAMES
from consilium.families.deepseek_v3 import corrected_gate
from consilium.model_config import ModelConfig, parse_common

# What transformers' Glm4MoeConfig takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 8,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a Glm4MoeForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_common(config, partial_rotary=True)
    return ModelConfig(
        family="glm4_moe",
        gate=corrected_gate(config),
        qk_norm=optional(config, "use_qk_norm", False),
        attention_bias=optional(config, "attention_bias", False),
        output_bias=False,
        **experts_of(config, first_dense(config, common["num_layers"], 1)),
        **common,
    )
