"""GGUF files of random Q8_0 weights in a model's shape, written tensor by tensor: a large model needs little memory.

How fast a model computes depends on the shape of its weights and on which experts are chosen, not on what is in
them; random weights choose experts about evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 32  # values of Q8_0 that share a scale
BLOCK_BYTES = BLOCK + 2  # int8 each, and a float16
UNIFORM_STD = 256 / math.sqrt(12)  # of all the int8


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, and the llama.cpp architecture that computes it."""

    arch: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 4096
    qk_norm: bool = False  # over the whole of queries and keys, as OLMoE has it


SHAPES = {
    "olmoe-1b-7b": Shape("olmoe", 16, 2048, 64, 8, 1024, 16, 16, 128, 50304, qk_norm=True),
    # In GGUF an architecture `llama` with experts. Rows of Q8_0 are whole blocks of 32, and the default model's experts
    # have 176 neurons: llama.cpp is given 160, a tenth less work.
    "default": Shape("llama", 30, 576, 16, 8, 160, 9, 3, 64, 49152),
}


def write_random(shape: Shape, file: Path, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write ``file``; ``advance`` is called with the bytes of each tensor. Raises OSError."""
    tensors = _tensors(shape)
    partial = file.with_suffix(".partial")
    writer = GGUFWriter(partial, shape.arch)
    _add_metadata(writer, shape)
    for name, lengths in tensors.items():
        if _is_float(name):
            writer.add_tensor_info(name, lengths, np.dtype(np.float32), 4 * math.prod(lengths))
        else:
            stored = (*lengths[:-1], lengths[-1] // BLOCK * BLOCK_BYTES)
            size = math.prod(stored)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), size, GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, lengths in tensors.items():
        tensor = _floats(random, name, lengths) if _is_float(name) else _q8_0(random, lengths)
        writer.write_tensor_data(tensor)
        advance(tensor.nbytes)
    writer.close()
    partial.rename(file)


def file_bytes(shape: Shape) -> int:
    """Bytes of all the tensors."""
    lengths = _tensors(shape).items()
    return sum(math.prod(each) * (4 * BLOCK if _is_float(name) else BLOCK_BYTES) // BLOCK for name, each in lengths)


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and lengths (rows first, as numpy has them) in the file's order."""
    hidden, experts, size = shape.hidden, shape.experts, shape.expert_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocabulary, hidden)}
    for layer in range(shape.layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_norm": (hidden,),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, size, hidden),
            "ffn_up_exps": (experts, size, hidden),
            "ffn_down_exps": (experts, hidden, size),
        }
        if shape.qk_norm:
            block |= {"attn_q_norm": (queries,), "attn_k_norm": (keys,)}
        tensors |= {f"blk.{layer}.{name}.weight": lengths for name, lengths in block.items()}
    return {**tensors, "output_norm.weight": (hidden,), "output.weight": (shape.vocabulary, hidden)}


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.expert_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")  # token ids are all that the benchmarks use


def _is_float(name: str) -> bool:
    """llama.cpp keeps norms and the gate in float32."""
    return "norm" in name or "ffn_gate_inp" in name


def _floats(random: np.random.Generator, name: str, lengths: tuple[int, ...]) -> Array:
    if "norm" in name:
        return np.ones(lengths, np.float32)
    return random.normal(0, lengths[-1] ** -0.5, lengths).astype(np.float32)


def _q8_0(random: np.random.Generator, lengths: tuple[int, ...]) -> Array:
    """Random rows of variance 1 / row length, as bytes [..., row length / 32 * 34]."""
    blocks = np.empty((math.prod(lengths) // BLOCK, BLOCK_BYTES), np.uint8)
    scale = np.float16(1 / (UNIFORM_STD * math.sqrt(lengths[-1])))
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    blocks[:, 2:] = np.frombuffer(random.bytes(len(blocks) * BLOCK), np.uint8).reshape(-1, BLOCK)
    return blocks.reshape(*lengths[:-1], -1)
