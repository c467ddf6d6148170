"""What an operator may change about a gate's choice, as pure functions over the routing. Off unless asked for.

Both change what a model says; `python -m bench.gate_policies` measures by how much. Letters: T tokens, E experts,
K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.gate import Routing
from consilium.kernels import capacity as kernel


def adaptive_k(routing: Routing, mass: float, least: int, most: int) -> Routing:
    """Of each token's experts the fewest whose share of its weights is at least ``mass``, from ``least`` to ``most``
    (Huang et al. 2024, "Harder Tasks Need More Experts"; here among the K that the gate chose).

    What is left is scaled to the same sum. A row depends on no other row.
    """
    values, order = torch.sort(routing.weights, dim=-1, descending=True, stable=True)  # [T, K]
    cumulative = values.cumsum(dim=-1)
    total, places = cumulative[:, -1:], torch.arange(values.shape[1])
    needed = (cumulative - values < mass * total) | (places < least)
    needed &= places < most
    left = torch.where(needed, values, 0).cumsum(dim=-1)[:, -1:]
    kept = torch.empty_like(needed).scatter_(-1, order, needed)
    return Routing(routing.ids, torch.where(kept, routing.weights * (total / left), 0), kept)


@dataclass(frozen=True, slots=True)
class Limited:
    """A routing in which experts have no more tokens than they should, and what that took."""

    routing: Routing
    moved: int  # pairs that went to another expert
    over: int  # pairs for which no other expert had room: they stay


def limit_load(routing: Routing, scores: Tensor, most: int) -> Limited:
    """At most ``most`` tokens an expert: it keeps those with the largest weights, the others go to the next-best expert
    with room by ``scores`` [T, E] (Lepikhin et al. 2020, "GShard", drops them instead).

    A token's weights are those of its new experts, scaled to the same sum. A row depends on all other rows.
    """
    ids = routing.ids.clone()
    kept = torch.ones_like(ids, dtype=torch.bool) if routing.kept is None else routing.kept
    order = torch.sort(routing.weights.flatten(), descending=True, stable=True).indices
    moved, over = kernel.limit_load(ids.numpy(), kept.numpy(), order.numpy(), scores.contiguous().numpy(), most)
    changed = (ids != routing.ids).any(dim=-1, keepdim=True)
    weights = torch.where(kept, scores.gather(-1, ids), 0)
    weights = weights * (routing.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True))
    weights = torch.where(changed, weights, routing.weights)
    ids, back = torch.sort(ids, dim=-1)
    own = None if routing.kept is None else kept.gather(-1, back)
    return Limited(Routing(ids, weights.gather(-1, back), own), moved, over)
