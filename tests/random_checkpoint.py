"""Mixtral checkpoints of any size, quick to write: all experts of a kind hold the same random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.tiny_tokenizer import save_tokenizer

VOCABULARY = 384

Weights = NDArray[np.float16]


def save_random_mixtral(
    folder: Path, experts: int, layers: int = 4, hidden_size: int = 256, expert_size: int = 1024
) -> int:
    """Write a float16 checkpoint with a tokenizer; returns the bytes of its experts' tensors."""
    heads, head_dim = 4, hidden_size // 4
    random = np.random.default_rng(0)

    def weights(rows: int, columns: int) -> Weights:
        matrix: Weights = random.normal(0, columns**-0.5, (rows, columns)).astype(np.float16)
        return matrix

    ones = np.ones(hidden_size, np.float16)
    tensors = {
        "model.embed_tokens.weight": weights(VOCABULARY, hidden_size),
        "lm_head.weight": weights(VOCABULARY, hidden_size),
        "model.norm.weight": ones,
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors |= {f"{name}.{norm}_layernorm.weight": ones for norm in ("input", "post_attention")}
        tensors |= {f"{name}.self_attn.{part}_proj.weight": weights(heads * head_dim, hidden_size) for part in "qkvo"}
        tensors[f"{name}.block_sparse_moe.gate.weight"] = weights(experts, hidden_size)
    up, down = weights(expert_size, hidden_size), weights(hidden_size, expert_size)
    expert_tensors = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight": matrix
        for layer in range(layers)
        for expert in range(experts)
        for part, matrix in (("w1", up), ("w2", down), ("w3", up))
    }
    save_tokenizer(folder, VOCABULARY)
    save_file(tensors | expert_tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(experts, layers, hidden_size, expert_size, heads)))
    return sum(matrix.nbytes for matrix in expert_tensors.values())


def _config(experts: int, layers: int, hidden_size: int, expert_size: int, heads: int) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": expert_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
