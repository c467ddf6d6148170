"""DeepSeek-V3 and R1 (DeepSeek-AI 2024): V2's attention; a gate of sigmoids whose choice is corrected by a bias.

The layers for predicting several tokens at once (`num_nextn_predict_layers`) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium.config_json import optional, require_positive, require_size
from consilium.errors import CheckpointError
from consilium.families.deepseek import experts_of, first_dense
from consilium.families.deepseek_v2 import parse_latent
from consilium.families.names import MLP, Names, ffn, separate_or_fused
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig

NAMES = Names(
    router=MLP + ".gate.weight",
    correction=MLP + ".gate.e_score_correction_bias",
    experts=separate_or_fused(MLP),
    shared=ffn(MLP + ".shared_experts"),
    dense=ffn(MLP),
)

# What transformers' DeepseekV3Config takes for a key that config.json leaves out.
DEFAULTS = {
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_experts_per_tok": 8,
}


def parse(config: Mapping[str, Any]) -> ModelConfig:
    """config.json of a DeepseekV3ForCausalLM."""
    config = {**DEFAULTS, **config}
    common = parse_latent(config, interleaved=optional(config, "rope_interleave", True))
    moe_layers = first_dense(config, common["num_layers"], 3)
    return ModelConfig(family="deepseek_v3", gate=corrected_gate(config), **experts_of(config, moe_layers), **common)


def corrected_gate(config: Mapping[str, Any]) -> GateRule:
    """The gate without an auxiliary loss, as DeepSeek-V3 and GLM-4.5 state it."""
    for key, supported in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key) not in (None, supported):
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported; supported: {supported}")
    return GateRule(
        scores="sigmoid",
        normalize=optional(config, "norm_topk_prob", True),
        least_sum=1e-20,
        scaling=require_positive(config, "routed_scaling_factor"),
        correction=True,
        groups=require_size(config, "n_group"),
        top_groups=require_size(config, "topk_group"),
        group_members=2,
    )
