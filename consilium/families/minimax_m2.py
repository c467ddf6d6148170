"""MiniMax-M2 (MiniMax 2025): a corrected sigmoid gate, partly rotated heads, queries and keys normed over all heads.

The layers for predicting several tokens at once (`mtp`) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import require_size
from consilium.families.mixtral import NAMES as MIXTRAL
from consilium.families.names import Names
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig, parse_common

NAMES = Names(
    router=MIXTRAL.router,
    correction="model.layers.{layer}.block_sparse_moe.e_score_correction_bias",
    experts=MIXTRAL.experts,
    other_spelling=MIXTRAL.other_spelling,
)

# What transformers' MiniMaxM2Config takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 5e6,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "bos_token_id": 200034,
    "eos_token_id": 200020,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a MiniMaxM2ForCausalLM."""
    config = {**DEFAULTS, **config}
    if config.get("rotary_dim") is not None and config.get("partial_rotary_factor") is None:
        config["partial_rotary_factor"] = require_size(config, "rotary_dim") / require_size(config, "head_dim")
    common = parse_common(config, partial_rotary=True)
    return ModelConfig(
        family="minimax_m2",
        num_experts=require_size(config, "num_local_experts"),
        top_k=require_size(config, "num_experts_per_tok"),
        expert_size=require_size(config, "intermediate_size"),
        moe_layers=(True,) * common["num_layers"],
        gate=GateRule(scores="sigmoid", correction=True),
        qk_norm=True,
        qk_norm_whole=True,
        **common,
    )
