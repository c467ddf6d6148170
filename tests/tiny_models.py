"""Tiny random models, made and saved by transformers: the oracle's own idea of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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


def _save(folder: Path, architecture: Any, config: Any) -> Path:
    torch.manual_seed(config.hidden_size + config.num_hidden_layers)
    model = architecture(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones hide a norm that is left out, zeros a bias
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder, config.vocab_size)
    return folder
