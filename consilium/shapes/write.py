"""`consilium model random`: a shape's weights as an ordinary folder.

In int8 as `consilium quantize` writes it, or in bfloat16 as published models are: the same weights, rounded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.compressed_tensors import hash_key, scale_name
from consilium.content_hash import content_hash
from consilium.errors import ConfigError
from consilium.shapes.folder import RECIPE_KEY, ShapeFolder
from consilium.shapes.tensors import RandomTensors, tensor_specs
from consilium.tensor_index import INDEX_FILE


def write_shape(folder: ShapeFolder, out: Path, console: Console | None = None, *, bfloat16: bool = False) -> None:
    """Write ``folder`` to ``out``, a layer in memory at a time. Raises ConfigError when ``out`` holds anything.

    ``out`` appears when it is complete: until then what is written lies beside it.
    """
    console = console or Console(stderr=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already; give another folder")
    unfinished = out.absolute().with_name(f".{out.absolute().name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run has left
    unfinished.mkdir(parents=True)
    try:
        _write_weights(Checkpoint(folder), folder, unfinished, console, bfloat16=bfloat16)
        for name, make in folder.files().items():
            (unfinished / name).write_text(make(), "utf-8")
        if bfloat16:
            (unfinished / "config.json").write_text(json.dumps(_float_config(folder), indent=2) + "\n", "utf-8")
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    console.print(f"the weights of {folder} are in {out}", soft_wrap=True)


def _float_config(folder: ShapeFolder) -> dict[str, Any]:
    """config.json of weights that are like the shape's, and not the same."""
    return {key: value for key, value in folder.config.items() if key not in ("quantization_config", RECIPE_KEY)}


def _write_weights(checkpoint: Checkpoint, folder: ShapeFolder, out: Path, console: Console, *, bfloat16: bool) -> None:
    """A shard for each layer, one for the rest, and the index."""
    tensors = RandomTensors(folder.recipe, checkpoint.config, checkpoint.names)
    shards = list(_shards(checkpoint))
    weight_map: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        for number, (layer, names) in enumerate(bar.track(shards, description="writing"), 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            made = {name: tensors.find(name)[:] for name in names}
            written = _rounded(made) if bfloat16 else made
            _write_shard(out / file, written, {} if bfloat16 else _hashes(checkpoint, layer))
            weight_map |= dict.fromkeys(written, file)
            del made, written  # before the next layer's
    size = sum((out / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(checkpoint: Checkpoint) -> Iterator[tuple[int | None, list[str]]]:
    """The names of the tensors of every layer, and of those that are of none."""
    names = [spec.name for spec in tensor_specs(checkpoint.config, checkpoint.names)]
    for layer in range(checkpoint.config.num_layers):
        yield layer, [name for name in names if name.startswith(f"model.layers.{layer}.")]
    yield None, [name for name in names if not name.startswith("model.layers.")]


def _rounded(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in bfloat16 in place of int8 with scales."""
    floats = dict[str, Tensor]()
    for name, tensor in made.items():
        if tensor.dtype == torch.int8:
            floats[name] = (tensor * made[scale_name(name)]).bfloat16()
        elif tensor.dtype != torch.float32:  # what is float32 is scales
            floats[name] = tensor
    return floats


def _hashes(checkpoint: Checkpoint, layer: int | None) -> dict[str, str]:
    """The content hashes of a layer's experts, by their keys in a shard's metadata."""
    if layer is None or not checkpoint.config.moe_layers[layer]:
        return {}
    experts = range(checkpoint.config.num_experts)
    return {hash_key(layer, each): content_hash(checkpoint.expert(layer, each).matrices).hex() for each in experts}


def _write_shard(file: Path, tensors: dict[str, Tensor], hashes: dict[str, str]) -> None:
    save_file(tensors, file, {"format": "pt", **hashes})
    # safetensors makes its files readable by their owner alone; workers may run as another user.
    file.chmod(0o644)
