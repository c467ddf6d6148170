"""The shapes by name: config.json of each, in the words of a family that is served. Free of torch.

Qwen3-30B-A3B and Mixtral-8x7B are as published. OLMoE-1B-7B and DeepSeek-V2-Lite have the sizes of the published models
in the architecture of Qwen3-MoE: grouped-query attention with normed heads, and no shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Random weights never mean to end a text, so no token does.
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
_MIXTRAL = _COMMON | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
_QWEN3_MOE = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "default": _MIXTRAL
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 176,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_local_experts": 16,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
    },
    "deepseek-v2-lite": _QWEN3_MOE
    | {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "mlp_only_layers": [0],
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
    "mixtral-8x7b": _MIXTRAL
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-5,
    },
    "olmoe-1b-7b": _QWEN3_MOE
    | {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "moe_intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    },
    "qwen3-30b-a3b": _QWEN3_MOE
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
    },
    # For tests, and to see a stack start at once.
    "tiny": _QWEN3_MOE
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "mlp_only_layers": [0],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
    },
}
