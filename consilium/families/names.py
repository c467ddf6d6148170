"""Names of a checkpoint's tensors, as templates over ``{layer}`` and ``{expert}``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where the three matrices of an expert are found.

    Either one tensor each (gate and up [F, D], down [D, F]), or fused over the experts of a layer:
    ``gate_up`` [E, 2F, D] with the gate's rows first, and ``down`` [E, D, F].
    """

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""

    @property
    def fused(self) -> bool:
        return bool(self.gate_up)


@dataclass(frozen=True, slots=True)
class Names:
    """Names shared by the Llama-like families; a family replaces what it calls otherwise."""

    router: str  # the gate's matrix, [E, D]
    experts: tuple[ExpertLayout, ...]  # tried in this order
    dense: ExpertLayout | None = None  # the FFN of layers that do not route
    # A part of the names above that some writers replace by another, for example (".block_sparse_moe.", ".mlp.").
    other_spelling: tuple[str, str] | None = None
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    input_norm: str = "model.layers.{layer}.input_layernorm.weight"
    post_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    q_proj: str = "model.layers.{layer}.self_attn.q_proj"
    k_proj: str = "model.layers.{layer}.self_attn.k_proj"
    v_proj: str = "model.layers.{layer}.self_attn.v_proj"
    o_proj: str = "model.layers.{layer}.self_attn.o_proj"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
