"""config.json in both dialects: we read what transformers builds from it, and lies in it are named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from consilium.config_json import MAX_SIZE
from consilium.errors import CheckpointError
from consilium.families import FAMILIES, parse_config
from consilium.model_config import ModelConfig
from consilium.rope_config import RopeConfig

Json = dict[str, Any]

# As transformers 4 wrote them.
MIXTRAL: Json = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
QWEN3_MOE: Json = {
    **{key: value for key, value in MIXTRAL.items() if key != "num_local_experts"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 6,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "max_window_layers": 2,
    "attention_bias": False,
}
OLMOE: Json = {
    **{key: value for key, value in MIXTRAL.items() if key not in ("num_local_experts", "sliding_window")},
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_experts": 6,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "attention_bias": False,
}
QWEN2_MOE: Json = {
    **{key: value for key, value in QWEN3_MOE.items() if key not in ("head_dim", "attention_bias")},
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 56,
    "norm_topk_prob": False,
}
SIZES = [key for key, value in MIXTRAL.items() if type(value) is int and not key.endswith("token_id")]
ORACLES: dict[str, tuple[Any, Any]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

VARIANTS = [
    MIXTRAL,
    {**MIXTRAL, "head_dim": 10, "sliding_window": 7, "eos_token_id": [2, 7], "bos_token_id": None},
    {**MIXTRAL, "tie_word_embeddings": True, "rope_scaling": None},
    {**MIXTRAL, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {**MIXTRAL, "head_dim": 12, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}},
    {key: value for key, value in MIXTRAL.items() if key not in ("rope_theta", "rms_norm_eps", "eos_token_id")},
    {**MIXTRAL, "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts_per_tok": 1},
    QWEN3_MOE,
    {**QWEN3_MOE, "decoder_sparse_step": 2, "attention_bias": True, "norm_topk_prob": False},
    {**QWEN3_MOE, "mlp_only_layers": [0, 3], "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {**QWEN3_MOE, "mlp_only_layers": None, "use_sliding_window": True, "sliding_window": 5},
    {**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention"] * 4},
    {**QWEN3_MOE, "sliding_window": 5},
    {**QWEN3_MOE, "num_hidden_layers": 1, "intermediate_size": None},
    {key: value for key, value in QWEN3_MOE.items() if key not in ("rope_theta", "head_dim", "norm_topk_prob")},
    OLMOE,
    {**{key: value for key, value in OLMOE.items() if key not in ("rope_theta", "eos_token_id")}, "clip_qkv": 8.0},
    QWEN2_MOE,
    {**QWEN2_MOE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3, "qkv_bias": False},
    {
        **QWEN2_MOE,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
    },
]


def parts_of(model: Any) -> list[Json]:
    """What each layer of a transformers model is made of, whatever its config says."""
    config = model.config
    return [
        {
            "head_dim": layer.self_attn.head_dim,
            "bias": layer.self_attn.q_proj.bias is not None,
            "qk_norm": hasattr(layer.self_attn, "q_norm"),
            "window": window_of(layer, config),
            "clip": getattr(config, "clip_qkv", None),
            "norm": layer.self_attn.q_norm.weight.shape[0] if hasattr(layer.self_attn, "q_norm") else 0,
            "shared": shared_of(layer),
            "experts": tuple(layer.mlp.experts.down_proj.shape) if hasattr(layer.mlp, "experts") else None,
            "dense": None if hasattr(layer.mlp, "experts") else layer.mlp.up_proj.weight.shape[0],
            "top_k": layer.mlp.gate.top_k if hasattr(layer.mlp, "experts") else None,
            "normalize": getattr(config, "norm_topk_prob", True),
            "eps": layer.input_layernorm.variance_epsilon,
        }
        for layer in model.model.layers
    ]


def window_of(layer: Any, config: Any) -> int | None:
    """What a layer's attention may see; where layers differ, only those that slide have the attribute."""
    everywhere = None if config.model_type in ("qwen2_moe", "olmoe") else config.sliding_window
    window: int | None = getattr(layer.self_attn, "sliding_window", everywhere)
    return window


def shared_of(layer: Any) -> int:
    """The FFN size of the shared experts."""
    return layer.mlp.shared_expert.up_proj.weight.shape[0] if hasattr(layer.mlp, "shared_expert") else 0


def parts_read(config: ModelConfig) -> list[Json]:
    experts = (config.num_experts, config.hidden_size, config.expert_size)
    return [
        {
            "head_dim": config.head_dim,
            "bias": config.attention_bias,
            "qk_norm": config.qk_norm,
            "window": window,
            "clip": config.clip_qkv,
            "norm": (config.heads_size if config.qk_norm_whole else config.head_dim) if config.qk_norm else 0,
            "shared": config.shared_size if routes else 0,
            "experts": experts if routes else None,
            "dense": None if routes else config.dense_size,
            "top_k": config.top_k if routes else None,
            "normalize": config.gate.normalize,
            "eps": config.rms_norm_eps,
        }
        for routes, window in zip(config.moe_layers, config.sliding_windows or (None,) * config.num_layers, strict=True)
    ]


@pytest.mark.parametrize("raw", VARIANTS)
def test_both_dialects_mean_what_transformers_builds(raw: Json) -> None:
    config_class, model_class = ORACLES[raw["model_type"]]
    stated = {key: value for key, value in raw.items() if (key, value) != ("intermediate_size", None)}
    oracle = config_class.from_dict(stated)
    read = parse_config(raw)
    with torch.device("meta"):
        assert parts_read(read) == parts_of(model_class(oracle))
    assert (read.num_heads, read.num_kv_heads) == (oracle.num_attention_heads, oracle.num_key_value_heads)
    assert (read.vocab_size, read.tie_embeddings) == (oracle.vocab_size, oracle.tie_word_embeddings)
    eos = oracle.eos_token_id
    assert (list(read.eos_token_ids), read.bos_token_id) == (
        eos if isinstance(eos, list) else [eos],
        oracle.bos_token_id,
    )
    rope = {key: value for key, value in oracle.rope_parameters.items() if key != "type"}
    assert {"rope_theta": read.rope.theta, "rope_type": read.rope.rope_type, **read.rope.scaling} == rope
    assert parse_config(json.loads(oracle.to_json_string())) == read  # the dialect of transformers 5


def test_what_is_read() -> None:
    assert parse_config(QWEN3_MOE | {"decoder_sparse_step": 2, "eos_token_id": [2, 5]}) == ModelConfig(
        family="qwen3_moe",
        vocab_size=300,
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=256,
        rope=RopeConfig(1e6),
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        num_experts=6,
        top_k=2,
        expert_size=24,
        moe_layers=(False, True, False, True),
        dense_size=40,
        qk_norm=True,
        sliding_windows=(None,) * 4,
        eos_token_ids=(2, 5),
        bos_token_id=1,
    )


def test_key_value_heads_that_are_null_are_all_heads() -> None:
    assert parse_config({**MIXTRAL, "num_key_value_heads": None}).num_kv_heads == 4


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'LlamaForCausalLM'"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"model_type": ["mixtral"], "architectures": 5}, "mixtral"),
        ({"model_type": 5, "architectures": [[]]}, r"\[\]"),
        ({}, "None"),
    ],
)
def test_other_architectures_are_refused_by_name(raw: Json, named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"architecture .*{named}.* supported: {', '.join(sorted(FAMILIES))}$"):
        parse_config(raw)


@pytest.mark.parametrize(("model_type", "reason"), [("jamba", "Mamba"), ("switch_transformers", "an encoder")])
def test_known_families_are_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"'{model_type}' is not supported, for it has {reason}.*; supported: dee"
    ):
        parse_config({"model_type": model_type})


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope", "mrope", 5, ["yarn"]])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(key: str, rope_type: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**MIXTRAL, key: {"rope_type": rope_type, "factor": 2.0}})
    said = f"rope type {rope_type!r} is not supported; supported: default, linear, llama3, yarn"
    assert caught.value.message == f"config.json: {said}"


@pytest.mark.parametrize(
    ("raw", "change", "named"),
    [
        *((MIXTRAL, {key: lie}, key) for key in SIZES for lie in (0, -1, "4", 4.0, [4], True)),
        *((QWEN3_MOE, {key: -1}, key) for key in ("num_experts", "moe_intermediate_size", "head_dim")),
        *((MIXTRAL, {key: MAX_SIZE + 1}, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")),
        (MIXTRAL, {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        (MIXTRAL, {"hidden_size": None}, "hidden_size must be int, found nothing"),
        (MIXTRAL, {"hidden_size": 50}, "num_attention_heads"),
        (MIXTRAL, {"num_key_value_heads": 3}, "num_key_value_heads"),
        (MIXTRAL, {"head_dim": 9}, "head_dim must be even"),
        (MIXTRAL, {"num_experts_per_tok": 6}, "num_experts_per_tok is 6, of only 5"),
        (MIXTRAL, {"sliding_window": "all"}, "sliding_window"),
        (MIXTRAL, {"sliding_window": 0}, "sliding_window"),
        (MIXTRAL, {"rms_norm_eps": 0}, "rms_norm_eps"),
        (MIXTRAL, {"rms_norm_eps": math.nan}, "rms_norm_eps"),
        (MIXTRAL, {"rope_theta": "1e6"}, "rope_theta"),
        (MIXTRAL, {"rope_theta": 10**400}, "rope_theta"),
        (MIXTRAL, {"rope_theta": 1}, "rope_theta"),
        (MIXTRAL, {"rope_scaling": "linear"}, "rope_scaling must be dict"),
        (MIXTRAL, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        (MIXTRAL, {"rope_scaling": {"type": "yarn", "factor": -2}}, "rope_scaling.factor"),
        (MIXTRAL, {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": ""}}, "_parameters.beta_fast"),
        (MIXTRAL, {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1}}, "high_freq_factor"),
        (MIXTRAL, {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "per layer type"),
        (MIXTRAL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (MIXTRAL, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (MIXTRAL, {"hidden_act": ["silu"]}, "hidden_act"),
        (MIXTRAL, {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        (MIXTRAL, {"eos_token_id": "</s>"}, "eos_token_id"),
        (MIXTRAL, {"eos_token_id": [2, None]}, "eos_token_id"),
        (MIXTRAL, {"bos_token_id": 1.5}, "bos_token_id"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_MOE, {"decoder_sparse_step": 5}, "no layer routes"),
        (QWEN3_MOE, {"mlp_only_layers": [0, "1"]}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": {"0": 1}}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": [0], "intermediate_size": None}, "intermediate_size"),
        (QWEN3_MOE, {"use_sliding_window": "yes"}, "use_sliding_window"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        (QWEN3_MOE, {"norm_topk_prob": 1}, "norm_topk_prob"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts"),
    ],
)  # fmt: skip
def test_lies_are_named(raw: Json, change: Json, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config({**raw, **change})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "yarn", "silu", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "rope_theta", "x"]), inner)
    ),
    max_leaves=4,
)


@given(st.data(), st.sampled_from(sorted({each["model_type"] for each in VARIANTS})))
def test_junk_never_crashes(data: st.DataObject, family: str) -> None:
    raw = next(each for each in VARIANTS if each["model_type"] == family) | {
        "rope_scaling": None,
        "rope_parameters": None,
    }
    keys = data.draw(st.lists(st.sampled_from([key for key in raw if key != "model_type"]), max_size=2))
    try:
        config = parse_config({**raw, **{key: data.draw(JUNK) for key in keys}})
    except CheckpointError:
        return
    assert len(config.moe_layers) == config.num_layers
    assert len(config.sliding_windows) in (0, config.num_layers)
