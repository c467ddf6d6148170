"""Tiny random models, made and saved by transformers: the oracle's own idea of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny_tokenizer import save_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,  # larger than usual, so that logits and gates differ clearly between tokens
}


def save_mixtral(folder: Path, **overrides: Any) -> Path:
    """A random Mixtral in ``folder``, with a tokenizer; ``overrides`` are MixtralConfig's."""
    sizes = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return _save(folder, MixtralForCausalLM, MixtralConfig(**{**_COMMON, **sizes, **overrides}))


def save_qwen3_moe(folder: Path, **overrides: Any) -> Path:
    """A random Qwen3-MoE in ``folder``, with a tokenizer; ``overrides`` are Qwen3MoeConfig's."""
    sizes = {
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 24,
        "norm_topk_prob": True,
    }
    return _save(folder, Qwen3MoeForCausalLM, Qwen3MoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_olmoe(folder: Path, **overrides: Any) -> Path:
    """A random OLMoE in ``folder``, with a tokenizer; ``overrides`` are OlmoeConfig's."""
    sizes = {"intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3}
    return _save(folder, OlmoeForCausalLM, OlmoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_qwen2_moe(folder: Path, **overrides: Any) -> Path:
    """A random Qwen2-MoE in ``folder``, with a tokenizer; ``overrides`` are Qwen2MoeConfig's."""
    sizes = {
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 56,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    return _save(folder, Qwen2MoeForCausalLM, Qwen2MoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_deepseek(folder: Path, **overrides: Any) -> Path:
    """A random DeepSeekMoE (V1), with its twin for transformers, which lacks the family, in ``folder``/twin.

    The twin is a Qwen2-MoE whose shared expert's gate is always one half, and whose output is twice as large.
    """
    sizes = {
        "shared_expert_intermediate_size": 96,
        "qkv_bias": False,
        "mlp_only_layers": [0],
        "num_key_value_heads": 4,
        **overrides,
    }
    twin = save_qwen2_moe(folder / "twin", **sizes)
    tensors, own = load_file(twin / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if "shared_expert_gate" in name:
            tensor.zero_()
            continue
        own[name.replace("shared_expert", "shared_experts")] = tensor.clone()
        if name.endswith("shared_expert.down_proj.weight"):
            tensor *= 2
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder, 384)
    config = json.loads((twin / "config.json").read_text())
    config |= {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "first_k_dense_replace": 1}
    config |= {"n_routed_experts": config.pop("num_experts"), "n_shared_experts": 2, "scoring_func": "softmax"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_deepseek_v2(folder: Path, **overrides: Any) -> Path:
    """A random DeepSeek-V2 in ``folder``, with a tokenizer; ``overrides`` are DeepseekV2Config's."""
    sizes = {**_LATENT, "intermediate_size": 80, "num_key_value_heads": 4, "routed_scaling_factor": 1.5}
    return _save(folder, DeepseekV2ForCausalLM, DeepseekV2Config(**{**_COMMON, **sizes, **overrides}))


def save_deepseek_v3(folder: Path, **overrides: Any) -> Path:
    """A random DeepSeek-V3 in ``folder``, with a tokenizer; ``overrides`` are DeepseekV3Config's."""
    sizes = {**_LATENT, "intermediate_size": 80, "num_key_value_heads": 4, "n_group": 4, "topk_group": 2}
    return _save(folder, DeepseekV3ForCausalLM, DeepseekV3Config(**{**_COMMON, **sizes, **overrides}))


def save_gpt_oss(folder: Path, **overrides: Any) -> Path:
    """A random gpt-oss in ``folder``, with a tokenizer; ``overrides`` are GptOssConfig's."""
    sizes = {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 24,
        "sliding_window": 9,
        "swiglu_limit": 1.5,  # so that it is reached
    }
    return _save(folder, GptOssForCausalLM, GptOssConfig(**{**_COMMON, **sizes, **overrides}))


def save_granitemoe(folder: Path, **overrides: Any) -> Path:
    """A random Granite MoE in ``folder``, with a tokenizer; ``overrides`` are GraniteMoeConfig's."""
    sizes = {
        "intermediate_size": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.5,
    }
    return _save(folder, GraniteMoeForCausalLM, GraniteMoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_phimoe(folder: Path, **overrides: Any) -> Path:
    """A random Phi-MoE in ``folder``, with a tokenizer; ``overrides`` are PhimoeConfig's."""
    sizes = {
        "intermediate_size": 48,
        "num_local_experts": 6,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.2,
    }
    return _save(folder, PhimoeForCausalLM, PhimoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_ernie4_5_moe(folder: Path, **overrides: Any) -> Path:
    """A random ERNIE 4.5 MoE in ``folder``, with a tokenizer; ``overrides`` are Ernie4_5_MoeConfig's."""
    sizes = {"intermediate_size": 80, "moe_intermediate_size": 40, "moe_num_experts": 8, "moe_k": 3}
    return _save(folder, Ernie4_5_MoeForCausalLM, Ernie4_5_MoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_glm4_moe(folder: Path, **overrides: Any) -> Path:
    """A random GLM-4.5 in ``folder``, with a tokenizer; ``overrides`` are Glm4MoeConfig's."""
    sizes = {
        "intermediate_size": 80,
        "moe_intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
        "attention_bias": True,
    }
    return _save(folder, Glm4MoeForCausalLM, Glm4MoeConfig(**{**_COMMON, **sizes, **overrides}))


def save_minimax_m2(folder: Path, **overrides: Any) -> Path:
    """A random MiniMax-M2 in ``folder``, with a tokenizer; ``overrides`` are MiniMaxM2Config's."""
    sizes = {
        "intermediate_size": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "rotary_dim": 8,
    }
    return _save(folder, MiniMaxM2ForCausalLM, MiniMaxM2Config(**{**_COMMON, **sizes, **overrides}))


_LATENT: dict[str, Any] = {
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def _save(folder: Path, architecture: Any, config: Any) -> Path:
    torch.manual_seed(config.hidden_size + config.num_hidden_layers)
    model = architecture(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones hide a norm that is left out, zeros a bias
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
            elif name.endswith("sinks"):
                parameter.uniform_(-2, 3)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.uniform_(-0.3, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return folder
