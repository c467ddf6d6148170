"""Writes the model with fewer experts, a layer in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError, ConfigError
from consilium.families import require_offline
from consilium.prune.choose import Expert, choose_kept, merge, nearest_kept
from consilium.tensor_files import PICKLE_PATTERNS
from consilium.tensor_index import INDEX_FILE

NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "provenance.json", ".*", *PICKLE_PATTERNS)
_EXPERT_KEYS = ("num_local_experts", "num_experts")


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
    if checkpoint.scheme is not None or not isinstance(checkpoint.folder, Path):
        raise CheckpointError(f"{checkpoint.folder} is quantized; prune the float model, then run: consilium quantize")
    require_offline(checkpoint.config, "consilium prune")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give another folder")
    config = checkpoint.config
    for layer in config.expert_layers():
        choose_kept(pruning.load[layer], pruning.drop, config.top_k)
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    shards = config.num_layers + 1
    for number in range(shards):
        layer = number - 1
        tensors = _outer(checkpoint) if number == 0 else _layer(checkpoint, layer, pruning)
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        shard = {key: tensor.contiguous().clone() for key, tensor in tensors}
        save_file(shard, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        advance()
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(file, out / file.name)
    (out / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n", "utf-8")
    left = {key: config.num_experts - pruning.drop for key in _EXPERT_KEYS if key in checkpoint.raw}
    (out / "config.json").write_text(json.dumps({**checkpoint.raw, **left}, indent=2) + "\n", "utf-8")


def _outer(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    names = checkpoint.names
    for name in (names.embed, names.final_norm, *(() if checkpoint.config.tie_embeddings else (names.head,))):
        yield name, checkpoint.tensor(name, checkpoint.shape(name))


def _layer(checkpoint: Checkpoint, layer: int, pruning: Pruning) -> Iterator[tuple[str, Tensor]]:
    config, names = checkpoint.config, checkpoint.names
    projections = (names.q_proj, names.k_proj, names.v_proj, names.o_proj)
    kinds = (".weight", ".bias") if config.attention_bias else (".weight",)
    templates = [names.input_norm, names.post_norm, *(name + kind for name in projections for kind in kinds)]
    templates += [names.q_norm, names.k_norm] if config.qk_norm else []
    if not config.moe_layers[layer] and names.dense is not None:
        templates += [names.dense.gate, names.dense.up, names.dense.down]
    for template in templates:
        name = template.format(layer=layer)
        yield name, checkpoint.tensor(name, checkpoint.shape(name))
    if config.moe_layers[layer]:
        yield from _routed(checkpoint, layer, pruning)


def _routed(checkpoint: Checkpoint, layer: int, pruning: Pruning) -> Iterator[tuple[str, Tensor]]:
    config, names = checkpoint.config, checkpoint.names
    name, rows = names.router.format(layer=layer), pruning.load[layer]
    router = checkpoint.tensor(name, (config.num_experts, config.hidden_size))
    kept = choose_kept(rows, pruning.drop, config.top_k)
    yield name, router[kept]
    guests: dict[int, list[int]] = {expert: [] for expert in kept}
    for dropped in range(config.num_experts) if pruning.merge else ():
        if dropped not in guests:
            guests[nearest_kept(router, dropped, kept)].append(dropped)
    layout = names.experts[0]
    for place, expert in enumerate(kept):
        matrices = _merged(checkpoint, layer, expert, guests[expert], rows)
        for template, matrix in zip((layout.gate, layout.up, layout.down), matrices, strict=True):
            yield template.format(layer=layer, expert=place), matrix


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
