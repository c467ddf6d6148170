"""Reads the dense teacher: a Llama-style model in a GGUF file or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from consilium.default_model.conversion import DenseShape, read_shape, unpermute_heads
from consilium.default_model.gguf_file import GgufFile
from consilium.errors import CheckpointError
from consilium.tensor_files import TensorFiles
from training.llama import Dense, Matrices, Norms

_FOLDER = "model.layers.{layer}."
_FOLDER_NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def load_teacher(path: Path) -> Dense:
    """The model in float32 on the CPU. Raises CheckpointError for another architecture."""
    return _from_folder(path) if path.is_dir() else _from_gguf(GgufFile(path))


def moved(model: Dense, device: torch.device, dtype: torch.dtype) -> Dense:
    """The same weights elsewhere, or in another dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    layers = [(Norms(*map(move, norms)), Matrices(*map(move, w))) for norms, w in model.layers]
    return dataclasses.replace(model, embed=move(model.embed), layers=layers, final_norm=move(model.final_norm))


def _from_gguf(gguf: GgufFile) -> Dense:
    shape = read_shape(gguf)

    def read(name: str) -> Tensor:
        return torch.from_numpy(gguf.tensor(f"{name}.weight").copy())

    def layer(number: int) -> tuple[Norms, Matrices]:
        def part(name: str) -> Tensor:
            return read(f"blk.{number}.{name}")

        q = torch.from_numpy(unpermute_heads(part("attn_q").numpy(), shape.num_heads))
        k = torch.from_numpy(unpermute_heads(part("attn_k").numpy(), shape.num_kv_heads))
        others = [part(name) for name in ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
        return Norms(part("attn_norm"), part("ffn_norm")), Matrices(q, k, *others)

    return Dense(shape, read("token_embd"), [layer(n) for n in range(shape.num_layers)], read("output_norm"))


def _from_folder(folder: Path) -> Dense:
    shape = _folder_shape(folder)
    files = TensorFiles(folder)

    def read(name: str) -> Tensor:
        tensor: Tensor = files.find(name)[:]
        return tensor.float()

    def layer(number: int) -> tuple[Norms, Matrices]:
        prefix = _FOLDER.format(layer=number)
        norms = [read(f"{prefix}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")]
        return Norms(*norms), Matrices(*(read(f"{prefix}{name}.weight") for name in _FOLDER_NAMES))

    layers = [layer(number) for number in range(shape.num_layers)]
    return Dense(shape, read("model.embed_tokens.weight"), layers, read("model.norm.weight"))


def _folder_shape(folder: Path) -> DenseShape:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config.get("model_type") != "llama" or config.get("attention_bias") or config.get("rope_scaling"):
        raise CheckpointError(
            f"{folder}: only llama models without biases and rope scaling can be split, found "
            f"{config.get('model_type')!r}; give another teacher"
        )
    if not config.get("tie_word_embeddings", False):
        raise CheckpointError(f"{folder}: the head must be the embedding (tie_word_embeddings); give another teacher")
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    pad = config.get("pad_token_id")
    return DenseShape(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        dense_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        rms_norm_eps=config["rms_norm_eps"],
        bos_token_id=config["bos_token_id"],
        eos_token_id=config["eos_token_id"],
        pad_token_id=config["eos_token_id"] if pad is None else pad,
    )
