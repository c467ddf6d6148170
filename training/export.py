"""Writes a student as an ordinary Hugging Face folder in Mixtral's format, in float32.

Letters: D hidden size, E experts, S neurons of an expert.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from consilium.default_model.conversion import DenseShape
from consilium.default_model.gguf_file import GgufFile
from consilium.default_model.tokenizer import read_tokenizer, tokenizer_config
from consilium.families.mixtral import NAMES
from training.student import Student, StudentLayer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def write_model(student: Student, top_k: int, teacher: Path, folder: Path) -> None:
    """The student with its adapters merged, and the teacher's tokenizer. ``teacher`` is where it was read from."""
    routers = [layer.router for layer in student.layers if layer.router is not None]
    experts, neurons = routers[0].spread.shape
    tensors = {NAMES.embed: student.embed, NAMES.final_norm: student.final_norm}
    for number, layer in enumerate(student.layers):
        tensors |= _layer_tensors(layer, number, top_k)
    stored = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    _copy_tokenizer(teacher, folder)
    config = mixtral_config(student.shape, experts=experts, top_k=top_k, size=neurons // experts)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def mixtral_config(shape: DenseShape, *, experts: int, top_k: int, size: int) -> dict[str, object]:
    """The config.json."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": size,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
        "pad_token_id": shape.pad_token_id,
        "torch_dtype": "float32",
    }


def _layer_tensors(layer: StudentLayer, number: int, top_k: int) -> dict[str, Tensor]:
    """Weights of the K chosen sum to one in Mixtral and to K while training, so the down projections get the factor."""
    assert layer.router is not None
    w, names = layer.merged(torch.float32), NAMES
    found = {
        names.input_norm: layer.norms.attention,
        names.post_norm: layer.norms.ffn,
        names.router: layer.router.rows(),
        **{
            f"{name}.weight": matrix
            for name, matrix in zip((names.q_proj, names.k_proj, names.v_proj, names.o_proj), w[:4], strict=True)
        },
    }
    layout, experts = names.experts[0], len(layer.router.spread)
    parts = zip(w.gate.chunk(experts), w.up.chunk(experts), w.down.chunk(experts, dim=1), strict=True)
    for expert, (gate, up, down) in enumerate(parts):
        for template, matrix in ((layout.gate, gate), (layout.up, up), (layout.down, top_k * down)):
            found[template.replace("{expert}", str(expert))] = matrix
    return {template.format(layer=number): tensor for template, tensor in found.items()}


def _copy_tokenizer(teacher: Path, folder: Path) -> None:
    if teacher.is_dir():
        for name in _TOKENIZER_FILES:
            if (teacher / name).is_file():
                (folder / name).write_bytes((teacher / name).read_bytes())
        return
    gguf = GgufFile(teacher)
    read_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(gguf), indent=2) + "\n", "utf-8")
