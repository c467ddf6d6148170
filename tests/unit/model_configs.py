"""A model's shape for tests that need no checkpoint."""

from __future__ import annotations

from typing import Any

from consilium.model_config import ModelConfig
from consilium.rope_config import RopeConfig


def tiny_config(**overrides: Any) -> ModelConfig:
    """A small ModelConfig; all layers route unless said otherwise."""
    fields: dict[str, Any] = {
        "family": "mixtral",
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position": 256,
        "rope": RopeConfig(10000.0),
        "rms_norm_eps": 1e-6,
        "tie_embeddings": False,
        "num_experts": 4,
        "top_k": 2,
        "expert_size": 16,
        **overrides,
    }
    fields.setdefault("moe_layers", (True,) * fields["num_layers"])
    return ModelConfig(**fields)
