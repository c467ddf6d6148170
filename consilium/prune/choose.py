"""Which experts stay and what becomes of the others: pure functions of recorded load and of weights.

Letters: E experts of a layer, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.errors import ConfigError
from consilium.model_config import ModelConfig

Expert = tuple[Tensor, Tensor, Tensor]  # gate and up [F, D], down [D, F]


def read_load(content: Mapping[str, Any], config: ModelConfig) -> dict[int, list[int]]:
    """Rows of every expert by layer, as `/load/experts` says them. Raises ConfigError for those of another model."""
    layers = content.get("layers")
    if not isinstance(layers, list):
        raise ConfigError("the load has no list `layers`; save it with: curl http://GATEWAY/load/experts")
    found = {int(each["layer"]): [int(rows) for rows in each["rows"]] for each in layers}
    for layer in config.expert_layers():
        if len(found.get(layer, ())) != config.num_experts:
            raise ConfigError(
                f"the load has {len(found.get(layer, ()))} experts in layer {layer}, the model {config.num_experts}; "
                "record it on a gateway that serves this model, after some traffic"
            )
    return found


def choose_kept(rows: Sequence[int], drop: int, top_k: int) -> list[int]:
    """All but the ``drop`` least used experts, ascending. Raises ConfigError where too few would be left."""
    if not 0 < drop <= len(rows) - top_k:
        raise ConfigError(
            f"--drop: a layer has {len(rows)} experts and every token needs {top_k}; drop 1 to {len(rows) - top_k}"
        )
    by_use = sorted(range(len(rows)), key=lambda expert: (-rows[expert], expert))
    return sorted(by_use[: len(rows) - drop])


def nearest_kept(router: Tensor, dropped: int, kept: Sequence[int]) -> int:
    """The kept expert that the gate [E, D] likes for the same tokens: the one whose row points the same way."""
    rows = nn.normalize(router.float(), dim=1)
    return kept[int((rows[list(kept)] @ rows[dropped]).argmax())]


def merge(kept: Expert, dropped: Expert, share: float) -> Expert:
    """Both in one: the mean of neurons that are most alike, the dropped one's with weight ``share`` (0 to 1).

    Neurons have no order, so they are matched first (M-SMoE, Li et al. 2023).
    """
    mine, theirs = _neurons(kept), _neurons(dropped)  # [F, 3D]
    order = match(nn.normalize(mine, dim=1) @ nn.normalize(theirs, dim=1).T)
    mixed = torch.lerp(mine, theirs[order], share)
    gate, up, down = mixed.chunk(3, dim=1)
    return gate.contiguous(), up.contiguous(), down.T.contiguous()


def match(likeness: Tensor) -> Tensor:
    """A partner [F] for every row of likeness [F, F]: time and again the pairs that like each other best."""
    left, partner = likeness.clone(), torch.full((len(likeness),), -1)
    while (partner < 0).any():
        best_column, best_row = left.argmax(1), left.argmax(0)
        mutual = (best_row[best_column] == torch.arange(len(left))) & (partner < 0)
        partner[mutual] = best_column[mutual]
        left[mutual], left[:, best_column[mutual]] = -torch.inf, -torch.inf
    return partner


def _neurons(expert: Expert) -> Tensor:
    gate, up, down = expert
    return torch.cat((gate.float(), up.float(), down.float().T), dim=1)
