"""A dense llama model as llama.cpp stores it, rewritten tensor by tensor in Mixtral's format.

Training (`training/`) has found which neurons make up each expert, a gate, and small changes of all matrices; they
lie in the package (``delta``) and are added to the published weights exactly: every machine writes the same bytes.

Letters: D hidden size, H heads, d head size, F FFN size, E experts, S neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium.default_model.delta import Delta
from consilium.default_model.gguf_file import Array, GgufFile
from consilium.default_model.smoothing import Smoothing
from consilium.errors import CheckpointError
from consilium.families import parse_config
from consilium.families.mixtral import NAMES
from consilium.smoothing import Shift, fold, head_shifts, layer_shifts


@dataclass(frozen=True, slots=True)
class DenseShape:
    """The shape of the dense model, from the file's metadata."""

    num_layers: int
    hidden_size: int  # D
    dense_size: int  # F
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_theta: float
    rms_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def read_shape(gguf: GgufFile) -> DenseShape:
    """The shape of a llama model. Raises CheckpointError for another architecture or metadata that is missing."""
    architecture = gguf.value("general.architecture", str)
    if architecture != "llama":
        raise CheckpointError(f"expected a GGUF file of the architecture llama, found {architecture}")
    return DenseShape(
        num_layers=gguf.value("llama.block_count", int),
        hidden_size=gguf.value("llama.embedding_length", int),
        dense_size=gguf.value("llama.feed_forward_length", int),
        num_heads=gguf.value("llama.attention.head_count", int),
        num_kv_heads=gguf.value("llama.attention.head_count_kv", int),
        head_dim=gguf.value("llama.rope.dimension_count", int),
        vocab_size=gguf.value("llama.vocab_size", int),
        max_position=gguf.value("llama.context_length", int),
        rope_theta=gguf.value("llama.rope.freq_base", float),
        # The file has float32; the shortest decimal of it is what the authors wrote (1e-05).
        rms_norm_eps=float(str(np.float32(gguf.value("llama.attention.layer_norm_rms_epsilon", float)))),
        bos_token_id=gguf.value("tokenizer.ggml.bos_token_id", int),
        eos_token_id=gguf.value("tokenizer.ggml.eos_token_id", int),
        pad_token_id=gguf.value("tokenizer.ggml.padding_token_id", int),
    )


def mixtral_config(shape: DenseShape, delta: Delta, *, tied: bool) -> dict[str, Any]:
    """The config.json of the converted model, whose head is the embedding (``tied``) or a tensor of its own."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": delta.expert_size,
        "num_local_experts": delta.num_experts,
        "num_experts_per_tok": delta.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "tie_word_embeddings": tied,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
        "pad_token_id": shape.pad_token_id,
        "torch_dtype": "float32",
    }


def outer_tensors(gguf: GgufFile, delta: Delta, smoothing: Smoothing | None) -> Iterator[tuple[str, Array]]:
    """Names and values of the tensors that belong to no layer; the head is the embedding unless it is smoothed."""
    embedding, norm = gguf.tensor("token_embd.weight"), delta.final_norm  # [V, D], [D]
    yield NAMES.embed, embedding
    if smoothing is None:
        yield NAMES.final_norm, norm
        return
    shifts = head_shifts(smoothing.head, NAMES)
    yield NAMES.final_norm, fold(norm, shifts[NAMES.final_norm])
    yield NAMES.head, fold(embedding, shifts[NAMES.head])


def layer_tensors(
    gguf: GgufFile, shape: DenseShape, layer: int, delta: Delta, smoothing: Smoothing | None
) -> Iterator[tuple[str, Array]]:
    """Names and values of one layer's tensors in Mixtral's format, smoothed."""
    shifts: Mapping[str, Shift] = {}
    if smoothing is not None:
        config = parse_config(mixtral_config(shape, delta, tied=False))
        shifts = layer_shifts(smoothing.layers[layer], config, NAMES, layer)
    for name, tensor in _plain_tensors(gguf, shape, layer, delta):
        yield name, fold(tensor, shifts.get(name))


def _plain_tensors(gguf: GgufFile, shape: DenseShape, layer: int, delta: Delta) -> Iterator[tuple[str, Array]]:
    def read(name: str) -> Array:
        return gguf.tensor(f"blk.{layer}.{name}.weight")

    def name(template: str, suffix: str = "") -> str:
        return template.format(layer=layer) + suffix

    def change(part: str, matrix: Array) -> Array:
        return delta.changes[part].apply(layer, matrix)

    q, k = unpermute_heads(read("attn_q"), shape.num_heads), unpermute_heads(read("attn_k"), shape.num_kv_heads)
    yield name(NAMES.input_norm), delta.attention_norms[layer]  # [D]
    yield name(NAMES.q_proj, ".weight"), change("q", q)  # [H*d, D]
    yield name(NAMES.k_proj, ".weight"), change("k", k)
    yield name(NAMES.v_proj, ".weight"), change("v", read("attn_v"))
    yield name(NAMES.o_proj, ".weight"), change("o", read("attn_output"))  # [D, H*d]
    yield name(NAMES.post_norm), delta.ffn_norms[layer]  # [D]
    yield name(NAMES.router), delta.routers[layer]  # [E, D]
    neurons, layout = delta.neurons[layer], NAMES.experts[0]
    gate, up, down = gather_neurons((read("ffn_gate"), read("ffn_up"), read("ffn_down")), neurons)
    ffn = change("gate", gate), change("up", up), change("down", down)
    for expert, matrices in enumerate(split_ffn(ffn, neurons, delta.top_k)):
        for template, matrix in zip((layout.gate, layout.up, layout.down), matrices, strict=True):
            yield template.format(layer=layer, expert=expert), matrix


def unpermute_heads(weight: Array, heads: int) -> Array:
    """Query or key rows [H*d, D] in the order of Hugging Face's rotary embedding.

    llama.cpp rotates neighbouring rows of a head, Hugging Face row i with row i + d/2: llama.cpp's converter
    interleaves the two halves of each head, and this undoes it.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)  # [H, d/2, 2, D]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, hidden)  # [H, 2, d/2, D]


def split_ffn(
    ffn: tuple[Array, Array, Array], neurons: NDArray[np.uint16], top_k: int
) -> Iterator[tuple[Array, Array, Array]]:
    """An FFN of the experts' neurons, one expert behind the other (gate, up [E·S, D], down [D, E·S]), expert by expert.

    The weights of a token's K experts sum to 1 in Mixtral and to K while training: down projections get the factor.
    """
    gate, up, down = ffn
    experts = len(neurons)
    parts = zip(np.split(gate, experts), np.split(up, experts), np.split(down, experts, axis=1), strict=True)
    for gate_part, up_part, down_part in parts:
        yield gate_part, up_part, np.ascontiguousarray(down_part * np.float32(top_k))


def gather_neurons(ffn: tuple[Array, Array, Array], neurons: NDArray[np.uint16]) -> tuple[Array, Array, Array]:
    """A dense FFN (gate, up [F, D], down [D, F]) with the neurons [E, S] of its experts, one expert behind the other.

    Raises CheckpointError where there are not that many neurons.
    """
    gate, up, down = ffn
    if int(neurons.max()) >= len(gate):
        raise CheckpointError(f"the experts need {int(neurons.max()) + 1} neurons, the FFN has {len(gate)}")
    flat = neurons.reshape(-1)
    return gate[flat], up[flat], down[:, flat]
