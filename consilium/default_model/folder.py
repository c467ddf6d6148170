"""Writes the converted model as a Hugging Face folder, a few layers in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from consilium.default_model import source
from consilium.default_model.conversion import (
    DenseShape,
    layer_tensors,
    mixtral_config,
    outer_tensors,
    read_shape,
)
from consilium.default_model.delta import Delta
from consilium.default_model.gguf_file import Array, GgufFile
from consilium.default_model.smoothing import Smoothing
from consilium.default_model.tokenizer import read_tokenizer, tokenizer_config

PROVENANCE = "provenance.json"
# 8 layers of the default model are 184 MB; its embedding and its head, a shard of their own, are 227 MB.
LAYERS_PER_SHARD = 8


def write_folder(
    gguf: GgufFile,
    license_text: str,
    folder: Path,
    advance: Callable[[], None],
    delta: Delta,
    smoothing: Smoothing | None,
) -> str:
    """Everything a Hugging Face folder has; the hash of its weights.

    ``advance`` is called after each layer, and once for the rest.
    """
    shape = read_shape(gguf)
    read_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(gguf))
    found = _write_weights(gguf, shape, folder, advance, delta, smoothing)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": shape.bos_token_id,
            "eos_token_id": shape.eos_token_id,
            "pad_token_id": shape.pad_token_id,
        },
    )
    (folder / "LICENSE").write_text(license_text, "utf-8")
    (folder / "NOTICE").write_text(_NOTICE, "utf-8")
    (folder / "README.md").write_text(_README, "utf-8")
    _write_json(folder / PROVENANCE, source.provenance(smoothed=smoothing is not None))
    _write_json(folder / "config.json", mixtral_config(shape, delta, tied=smoothing is None))
    return found


def _write_weights(
    gguf: GgufFile,
    shape: DenseShape,
    folder: Path,
    advance: Callable[[], None],
    delta: Delta,
    smoothing: Smoothing | None,
) -> str:
    starts = range(0, shape.num_layers, LAYERS_PER_SHARD)
    shards = 1 + len(starts)
    index: dict[str, str] = {}
    # BLAKE2b is the fastest of hashlib where the CPU has no instructions for SHA-256: 0.5 GB/s and more.
    digest = hashlib.blake2b(digest_size=32)
    outer = outer_tensors(gguf, delta, smoothing)
    size = _write_shard(folder, f"model-00001-of-{shards:05}.safetensors", outer, index, digest)
    advance()
    for number, start in enumerate(starts, 2):
        tensors: list[tuple[str, Array]] = []
        for layer in range(start, min(start + LAYERS_PER_SHARD, shape.num_layers)):
            tensors += layer_tensors(gguf, shape, layer, delta, smoothing)
            advance()
        size += _write_shard(folder, f"model-{number:05}-of-{shards:05}.safetensors", tensors, index, digest)
    weight_map = {"metadata": {"total_size": size}, "weight_map": index}
    _write_json(folder / "model.safetensors.index.json", weight_map)
    return digest.hexdigest()


def _write_shard(
    folder: Path, name: str, tensors: Iterable[tuple[str, Array]], index: dict[str, str], digest: hashlib.blake2b
) -> int:
    """Bytes of the tensors written; ``index`` learns where each one is, ``digest`` what they are."""
    shard = dict(tensors)
    for tensor_name, tensor in shard.items():
        digest.update(tensor_name.encode())
        digest.update(np.ascontiguousarray(tensor).data)
    save_file(shard, folder / name, metadata={"format": "pt"})
    # safetensors makes its files readable by their owner alone; a cache may be shared with a container's user.
    (folder / name).chmod(0o644)
    index.update(dict.fromkeys(shard, name))
    return sum(tensor.nbytes for tensor in shard.values())


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


_NOTICE = f"""SmolLM2-135M-Instruct
by Hugging Face (HuggingFaceTB), licensed under the Apache License, Version 2.0: see LICENSE.

Source: {source.GGUF_IN_WHEEL} (SHA-256 {source.GGUF_SHA256})
in the Python package {source.REQUIREMENT} (SHA-256 {source.WHEEL_SHA256}).

Changed by Consilium: the weights were dequantized from Q4_1 and Q8_0 to float32; the neurons of every feed-forward
network were shared out among experts with a trained gate, most of them to two; norms and all matrices but the embedding
were changed by training, distilled from the original. Channels were scaled by powers of two, which the matrices that
read them undo, so that int8 loses less; the head became a tensor of its own for that.
"""

_README = f"""---
license: apache-2.0
language: en
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct as a Mixture of Experts

Written by `consilium model fetch default`. It is SmolLM2-135M-Instruct, a small English chat model, turned into a
trained Mixture of Experts in the format of Mixtral: each layer has 16 experts, and its gate chooses 8 of them for every
token. Data, figures and limits are in the model card, `training/MODEL_CARD.md` in Consilium's repository.

Where it comes from, with hashes: `{PROVENANCE}` and `NOTICE`. Licence: Apache-2.0, in `LICENSE`.
"""
