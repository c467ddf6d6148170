"""config.json of published models means what their reports say; lies in it are named."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import CheckpointError
from consilium.families import FAMILIES, parse_config
from consilium.gate_rule import GateRule
from consilium.model_config import ModelConfig
from tests.unit.published_configs import PUBLISHED, Json
from tests.unit.test_families import JUNK


def routed_parameters(config: ModelConfig) -> int:
    return len(config.expert_layers()) * config.num_experts * 3 * config.expert_size * config.hidden_size


def test_every_family_is_here() -> None:
    assert {each["model_type"] for each in PUBLISHED.values()} == set(FAMILIES) - {"mixtral", "qwen3_moe"}


# In billions: most of what the models' names say.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("OLMoE-1B-7B", 6.4),
        ("Qwen1.5-MoE-A2.7B", 12.5),
        ("deepseek-moe-16b", 14.9),
        ("DeepSeek-V2-Lite", 14.4),
        ("DeepSeek-V3", 653.9),
        ("gpt-oss-20b", 19.1),
        ("granite-3.0-1b-a400m", 1.2),
        ("Phi-3.5-MoE", 40.3),
        ("ERNIE-4.5-21B-A3B", 20.4),
        ("GLM-4.5-Air", 99.7),
        ("MiniMax-M2", 224.7),
    ],
)
def test_the_experts_are_as_many_as_the_name_says(name: str, billions: float) -> None:
    assert routed_parameters(parse_config(PUBLISHED[name])) / 1e9 == pytest.approx(billions, abs=0.1)


def test_latent_attention_caches_latents() -> None:
    config = parse_config(PUBLISHED["DeepSeek-V3"])
    assert config.cached_elements == 61 * (64 + 512 + 512)
    assert (config.heads_size, config.rotated_size, config.rope.interleaved) == (128 * 128, 64, True)
    assert config.attention_scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(192))
    assert config.moe_layers == (False,) * 3 + (True,) * 58
    expected = GateRule(
        "sigmoid", least_sum=1e-20, scaling=2.5, correction=True, groups=8, top_groups=4, group_members=2
    )
    assert config.gate == expected
    assert parse_config(PUBLISHED["DeepSeek-V2-Lite"]).gate == GateRule(normalize=False)


def test_what_others_do_otherwise() -> None:
    oss = parse_config(PUBLISHED["gpt-oss-20b"])
    assert oss.sliding_windows == (128, None) * 12
    assert oss.activation is not None
    assert (oss.activation.alpha, oss.activation.limit) == (1.702, 7.0)
    without = {
        key: value for key, value in PUBLISHED["gpt-oss-20b"].items() if key not in ("rope_scaling", "layer_types")
    }
    assert parse_config(without) == oss
    phi = parse_config(PUBLISHED["Phi-3.5-MoE"])
    assert (phi.max_position, phi.layer_norm, phi.head_bias) == (4096, True, True)
    assert parse_config(PUBLISHED["GLM-4.5-Air"]).rotated_size == 64
    assert parse_config(PUBLISHED["MiniMax-M2"]).rotated_size == 64
    assert parse_config(PUBLISHED["ERNIE-4.5-21B-A3B"]).moe_layers == (False,) + (True,) * 27
    granite = parse_config(PUBLISHED["granite-3.0-1b-a400m"])
    assert (granite.gate.scaling, granite.residual_scale, granite.embedding_scale) == (0.22, 0.22, 12)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("DeepSeek-V3", {"kv_lora_rank": 500}, "kv_lora_rank 500"),
        ("DeepSeek-V3", {"n_group": 7}, "7 n_group"),
        ("DeepSeek-V3", {"topk_group": 9}, "9 topk_group"),
        ("DeepSeek-V3", {"n_group": 128, "topk_group": 3}, "too few for 8 experts"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("DeepSeek-V3", {"routed_scaling_factor": 0}, "routed_scaling_factor"),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepSeek-V2-Lite", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek-moe-16b", {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types must name 24"),
        ("gpt-oss-20b", {"sliding_window": None}, "there is no sliding_window"),
        ("gpt-oss-20b", {"swiglu_limit": -1}, "swiglu_limit"),
        ("Phi-3.5-MoE", {"num_experts_per_tok": 3}, "sparsemixer chooses two"),
        ("Phi-3.5-MoE", {"head_dim": 64}, "short_factor must be a list of 32"),
        ("ERNIE-4.5-21B-A3B", {"use_bias": True}, "use_bias"),
        ("OLMoE-1B-7B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("GLM-4.5-Air", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        ("OLMoE-1B-7B", {"clip_qkv": 0}, "clip_qkv"),
    ],
)
def test_lies_are_named(name: str, change: Json, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config({**PUBLISHED[name], **change})


@given(st.data(), st.sampled_from(sorted(PUBLISHED)))
def test_junk_never_crashes(data: st.DataObject, name: str) -> None:
    raw = PUBLISHED[name]
    keys = data.draw(st.lists(st.sampled_from([key for key in raw if key != "model_type"]), max_size=2))
    try:
        config = parse_config({**raw, **{key: data.draw(JUNK) for key in keys}})
    except CheckpointError:
        return
    assert len(config.moe_layers) == config.num_layers
