"""Families of Mixture-of-Experts models that are not served, each with the reason."""

from __future__ import annotations

_STATE = "layers that keep a state of their own in place of keys and values, which the cache cannot hold or copy"
_BOTH = "an encoder beside the decoder, and the engine runs decoders alone"
_SPARSE = "an indexer of its own that chooses the positions that attention sees"

# `model_type` of config.json: what the architecture has that is not built here.
REFUSED = {
    "minimax": f"it has linear attention: {_STATE}",
    "qwen3_next": f"it has linear attention: {_STATE}",
    "jamba": f"it has Mamba layers: {_STATE}",
    "granitemoehybrid": f"it has Mamba layers: {_STATE}",
    "llama4": "it attends within chunks, and weighs what experts get in place of what they return",
    "llama4_text": "it attends within chunks, and weighs what experts get in place of what they return",
    "switch_transformers": f"it has {_BOTH}",
    "nllb-moe": f"it has {_BOTH}",
    "deepseek_v32": f"it has {_SPARSE}",
    "glm_moe_dsa": f"it has {_SPARSE}",
}
