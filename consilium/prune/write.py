"""Writes the model with fewer experts, a layer in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError, ConfigError
from consilium.families import ExpertLayout
from consilium.other_tensors import other_names, read
from consilium.prune.choose import Expert, choose_kept, merge, nearest_kept
from consilium.tensor_files import PICKLE_PATTERNS
from consilium.tensor_index import INDEX_FILE

NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "provenance.json", ".*", *PICKLE_PATTERNS)
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class Pruning:
    """What is done to every layer that routes."""

    load: Mapping[int, Sequence[int]]  # rows of every expert by layer
    drop: int
    merge: bool = False  # into the kept expert that is most like it


def prune(checkpoint: Checkpoint, out: Path, pruning: Pruning, advance: Callable[[], None] = lambda: None) -> None:
    """Write the pruned model to ``out``; ``advance`` is called after every layer.

    Raises ConfigError and CheckpointError. A folder that is not finished has no config.json.
    """
    _check(checkpoint, pruning)
    folder = Path(str(checkpoint.folder))
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another folder")
    config = checkpoint.config
    for layer in config.expert_layers():
        choose_kept(pruning.load[layer], pruning.drop, config.top_k)
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    shards, names = config.num_layers + 1, other_names(checkpoint)
    for number in range(shards):
        layer = number - 1
        outer = ((each, read(checkpoint, each)) for each in names[None])
        tensors = outer if number == 0 else _layer(checkpoint, layer, names[layer], pruning)
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        shard = {key: tensor.contiguous().clone() for key, tensor in tensors}
        save_file(shard, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        advance()
    for file in sorted(folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, out / file.name)
    (out / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n", "utf-8")
    left = {key: config.num_experts - pruning.drop for key in _EXPERT_KEYS if key in checkpoint.raw}
    (out / "config.json").write_text(json.dumps({**checkpoint.raw, **left}, indent=2) + "\n", "utf-8")


def _layer(checkpoint: Checkpoint, layer: int, names: Sequence[str], pruning: Pruning) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of one layer: the gate's lose the rows of experts that go, others stay as they are."""
    of, config = checkpoint.names, checkpoint.config
    if not config.moe_layers[layer]:
        yield from ((name, read(checkpoint, name)) for name in names)
        return
    kept = choose_kept(pruning.load[layer], pruning.drop, config.top_k)
    gate = {
        checkpoint.spelling(each.format(layer=layer)) for each in (of.router, of.router_bias, of.correction) if each
    }
    router = of.router.format(layer=layer)
    guests = _guests(read(checkpoint, router), kept) if pruning.merge else {expert: [] for expert in kept}
    for name in names:
        tensor = read(checkpoint, name)
        if name in gate:
            tensor = tensor[..., kept] if name.endswith("bias") else tensor[kept]  # [E] or [1, E]; [E, D]
        yield name, tensor
    if checkpoint.layout(layer, 0).transposed:
        yield from _sliced(checkpoint, layer, kept)
        return
    matrices = [_merged(checkpoint, layer, expert, guests[expert], pruning.load[layer]) for expert in kept]
    yield from _named(of.experts[0], layer, matrices)


def _guests(router: Tensor, kept: Sequence[int]) -> dict[int, list[int]]:
    """Of each kept expert those that it takes in."""
    guests: dict[int, list[int]] = {expert: [] for expert in kept}
    for dropped in range(len(router)):
        if dropped not in guests:
            guests[nearest_kept(router, dropped, kept)].append(dropped)
    return guests


def _sliced(checkpoint: Checkpoint, layer: int, kept: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Fused tensors, biases among them, without the experts that go."""
    layout = checkpoint.layout(layer, 0)
    for template in (layout.gate_up, layout.down, layout.gate_up_bias, layout.down_bias):
        name = template.format(layer=layer)
        yield name, read(checkpoint, name)[list(kept)]


def _named(layout: ExpertLayout, layer: int, experts: Sequence[Expert]) -> Iterator[tuple[str, Tensor]]:
    if layout.fused:
        yield layout.gate_up.format(layer=layer), torch.stack([torch.cat(each[:2]) for each in experts])
        yield layout.down.format(layer=layer), torch.stack([each[2] for each in experts])
        return
    for place, matrices in enumerate(experts):
        for template, matrix in zip((layout.gate, layout.up, layout.down), matrices, strict=True):
            yield template.format(layer=layer, expert=place), matrix


def _check(checkpoint: Checkpoint, pruning: Pruning) -> None:
    """Raise CheckpointError for a model that cannot be pruned so, with the reason."""
    config = checkpoint.config
    if checkpoint.scheme is not None or not isinstance(checkpoint.folder, Path):
        raise CheckpointError(f"{checkpoint.folder} is quantized; prune the float model, then run: consilium quantize")
    if config.gate.groups > 1:
        raise CheckpointError(
            f"consilium prune cannot take experts from this {config.family} model: its gate chooses among "
            f"{config.gate.groups} groups of equally many experts"
        )
    if pruning.merge and config.expert_bias:
        raise CheckpointError(f"--merge does not know the biases of {config.family} experts; leave it out")


def _merged(checkpoint: Checkpoint, layer: int, expert: int, guests: Sequence[int], rows: Sequence[int]) -> Expert:
    """The expert with those merged into it, each weighed by its rows."""
    found = checkpoint.expert(layer, expert).floats()
    dtype, seen = found[0].dtype, max(1, rows[expert])
    for guest in guests:
        seen += rows[guest]
        found = merge(found, checkpoint.expert(layer, guest).floats(), rows[guest] / seen)
    gate, up, down = (matrix.to(dtype) for matrix in found)
    return gate, up, down


def kept_share(pruning: Pruning, top_k: int) -> float:
    """The part of all recorded rows that went to experts that stay."""
    kept = sum(sum(rows[each] for each in choose_kept(rows, pruning.drop, top_k)) for rows in pruning.load.values())
    return kept / max(1, sum(map(sum, pruning.load.values())))
