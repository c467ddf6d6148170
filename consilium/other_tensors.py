"""A checkpoint's tensors but for its experts', by their names on disk: what rewriting experts leaves alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from consilium.checkpoint import Checkpoint

_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")


def other_names(checkpoint: Checkpoint) -> dict[int | None, list[str]]:
    """The names by layer, None for those of no layer; layers that are not served (`mtp`) are left out."""
    experts = set(_expert_names(checkpoint))
    found: dict[int | None, list[str]] = {None: []} | {layer: [] for layer in range(checkpoint.config.num_layers)}
    for name in checkpoint.stored_names():
        match = _LAYER.match(name)
        layer = None if match is None else int(match[1])
        if name not in experts and layer in found:
            found[layer].append(name)
    return found


def read(checkpoint: Checkpoint, name: str) -> Tensor:
    """The whole tensor. Raises CheckpointError when it does not hold finite floats."""
    return checkpoint.tensor(name, checkpoint.shape(name))


def _expert_names(checkpoint: Checkpoint) -> Iterator[str]:
    """Every name that a matrix or a bias of an expert may have."""
    names = checkpoint.names
    for layout in names.experts:
        parts = (layout.gate, layout.up, layout.down, layout.gate_up, layout.gate_up_bias, layout.down_bias)
        for layer in checkpoint.config.expert_layers():
            for expert in range(1 if layout.fused else checkpoint.config.num_experts):
                for part in filter(None, parts):
                    name = part.format(layer=layer, expert=expert)
                    yield name
                    if names.other_spelling is not None:
                        yield name.replace(*names.other_spelling)
