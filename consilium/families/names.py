"""Names of a checkpoint's tensors, as templates over ``{layer}`` and ``{expert}``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where the three matrices of an expert are found.

    Either one tensor each (gate and up [F, D], down [D, F]), or fused over the experts of a layer:
    ``gate_up`` [E, 2F, D] with the gate's rows first, and ``down`` [E, D, F]; ``transposed`` they are [E, D, 2F], gate
    and up in turns, and [E, F, D]. Fused biases are [E, 2F], in the same order, and [E, D].
    """

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    transposed: bool = False
    gate_up_bias: str = ""
    down_bias: str = ""

    @property
    def fused(self) -> bool:
        return bool(self.gate_up)


MLP = "model.layers.{layer}.mlp"  # where most families keep a layer's FFN


def ffn(prefix: str) -> ExpertLayout:
    """An FFN's three matrices as Llama calls them, below ``prefix``."""
    return ExpertLayout(
        gate=prefix + ".gate_proj.weight", up=prefix + ".up_proj.weight", down=prefix + ".down_proj.weight"
    )


def separate_or_fused(prefix: str) -> tuple[ExpertLayout, ...]:
    """Experts below ``prefix``: one by one, or all of a layer in one tensor as transformers 5 holds them."""
    fused = ExpertLayout(gate_up=prefix + ".experts.gate_up_proj", down=prefix + ".experts.down_proj")
    return ffn(prefix + ".experts.{expert}"), fused


@dataclass(frozen=True, slots=True)
class Names:
    """Names shared by the Llama-like families; a family replaces what it calls otherwise."""

    router: str  # the gate's matrix, [E, D]
    experts: tuple[ExpertLayout, ...]  # tried in this order
    router_bias: str = ""  # [E], where the gate is a linear layer with a bias
    correction: str = ""  # [E] or [1, E], what the choice of experts sees on top of the scores
    shared: ExpertLayout | None = None  # the FFN of the shared experts, all of them together
    shared_gate: str = ""  # [1, D]
    dense: ExpertLayout | None = None  # the FFN of layers that do not route
    # A part of the names above that some writers replace by another, for example (".block_sparse_moe.", ".mlp.").
    other_spelling: tuple[str, str] | None = None
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    head_bias: str = "lm_head.bias"
    input_norm: str = "model.layers.{layer}.input_layernorm.weight"
    post_norm: str = "model.layers.{layer}.post_attention_layernorm.weight"
    q_proj: str = "model.layers.{layer}.self_attn.q_proj"
    k_proj: str = "model.layers.{layer}.self_attn.k_proj"
    v_proj: str = "model.layers.{layer}.self_attn.v_proj"
    o_proj: str = "model.layers.{layer}.self_attn.o_proj"
    q_norm: str = "model.layers.{layer}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{layer}.self_attn.k_norm.weight"
    # Multi-head latent attention's.
    q_a_proj: str = "model.layers.{layer}.self_attn.q_a_proj"
    q_a_norm: str = "model.layers.{layer}.self_attn.q_a_layernorm.weight"
    q_b_proj: str = "model.layers.{layer}.self_attn.q_b_proj"
    kv_a_proj: str = "model.layers.{layer}.self_attn.kv_a_proj_with_mqa"
    kv_a_norm: str = "model.layers.{layer}.self_attn.kv_a_layernorm.weight"
    kv_b_proj: str = "model.layers.{layer}.self_attn.kv_b_proj"
    sinks: str = "model.layers.{layer}.self_attn.sinks"
