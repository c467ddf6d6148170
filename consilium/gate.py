"""Gates as pure functions: which experts a token goes to, and with what weight.

Each is written as published; what the gateway runs are kernels that compute the same in a fixed order
(consilium.kernels.gate, gate_rules). Equal scores go to the lower id: a stable sort, since ``torch.topk`` breaks ties
arbitrarily. Letters: T tokens, E experts, K experts per token, G groups of neighbouring experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.gate_rule import GateRule


@dataclass(frozen=True, slots=True)
class Routing:
    """The K experts of every token, ascending by id, so that whatever walks over K has one fixed order."""

    ids: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float32
    kept: Tensor | None = None  # [T, K] bool: experts that are asked; None is all of them


def softmax_top_k(logits: Tensor, top_k: int, *, normalize: bool) -> Routing:
    """Softmax over all E experts [T, E], then the K largest (Shazeer et al. 2017 turned round; Mixtral, Qwen, OLMoE).

    ``normalize`` rescales the chosen weights to sum to one.
    """
    scores = torch.softmax(logits.float(), dim=-1)  # [T, E]
    return _weigh(scores, _choose(scores, top_k), normalize=normalize)


def top_k_softmax(logits: Tensor, top_k: int) -> Routing:
    """The K largest logits [T, E], then softmax over them (Shazeer et al. 2017; gpt-oss, Granite).

    The same as normalized ``softmax_top_k`` but for rounding.
    """
    ids = _choose(logits.float(), top_k)
    return _ascending(ids, torch.softmax(logits.float().gather(-1, ids), dim=-1))


def biased_top_k(
    scores: Tensor, correction: Tensor, top_k: int, *, normalize: bool, least_sum: float = 0.0, scaling: float = 1.0
) -> Routing:
    """The K largest of scores [T, E] plus a correction [E], weighed by the scores alone (Wang et al. 2024,
    "Auxiliary-Loss-Free Load Balancing"): DeepSeek-V3 and GLM-4.5 over sigmoids, ERNIE 4.5 over a softmax.
    """
    return _weigh(scores, _choose(scores + correction, top_k), normalize=normalize, least=least_sum, scaling=scaling)


def limit_groups(scores: Tensor, groups: int, top_groups: int, members: int) -> Tensor:
    """Scores [T, E], -inf outside of the ``top_groups`` best of G groups of neighbours (DeepSeek-AI 2024, V2 and V3).

    A group's score is the sum of its ``members`` best: of the best one in V2, of the best two in V3.
    """
    grouped = scores.unflatten(-1, (groups, -1))  # [T, G, E / G]
    best = grouped.sort(dim=-1, descending=True).values[..., :members].sum(dim=-1)  # [T, G]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, _choose(best, top_groups), value=True)
    limited: Tensor = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return limited


def sparse_mixer(logits: Tensor, jitter: float) -> Routing:
    """Two experts, one after the other, each weighed among those not much below it (Liu et al. 2024, "GRIN"; PhiMoE).

    "Not much below" the best logit m: (m - logit) / max(|logit|, m) <= 2 · ``jitter``.
    """
    logits, ids, weights = logits.float(), [], []
    left = logits
    for _ in range(2):
        best = _choose(left, 1)  # [T, 1]
        most = left.gather(-1, best)
        far = (most - logits) / torch.maximum(logits.abs(), most) > 2 * jitter
        ids.append(best)
        weights.append(torch.softmax(left.masked_fill(far, -torch.inf), dim=-1).gather(-1, best))
        left = left.scatter(-1, best, -torch.inf)
    return _ascending(torch.cat(ids, -1), torch.cat(weights, -1))


def gshard_top_2(logits: Tensor, uniform: Tensor | None = None) -> Routing:
    """Softmax, the best two, weights that sum to one; the second is asked with twice its weight's probability at most
    (Lepikhin et al. 2020, "GShard", algorithm 1).

    ``uniform`` [T] are random numbers from [0, 1): a second expert whose weight is not above half of its number gets
    the weight 0. Without them it is always asked, as in evaluation.
    """
    scores = torch.softmax(logits.float(), dim=-1)
    ids = _choose(scores, 2)  # [T, 2]
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if uniform is not None:
        weights[:, 1] = torch.where(2 * weights[:, 1] > uniform, weights[:, 1], 0)
    return _ascending(ids, weights)


def route(logits: Tensor, correction: Tensor | None, rule: GateRule, top_k: int) -> Routing:
    """The gate of a model, by its rule; ``correction`` [E] where the rule has one."""
    if rule.scores == "sparsemixer":
        return _scaled(sparse_mixer(logits, rule.jitter), rule.scaling)
    if rule.scores == "top_k_softmax":
        return _scaled(top_k_softmax(logits, top_k), rule.scaling)
    scores = logits.float().sigmoid() if rule.scores == "sigmoid" else torch.softmax(logits.float(), dim=-1)
    ranks = scores if correction is None else scores + correction
    if rule.groups > 1:
        ranks = limit_groups(ranks, rule.groups, rule.top_groups, rule.group_members)
    ids = _choose(ranks, top_k)
    return _weigh(scores, ids, normalize=rule.normalize, least=rule.least_sum, scaling=rule.scaling)


def _choose(scores: Tensor, count: int) -> Tensor:
    """The ids [T, count] of the largest, descending."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def _weigh(scores: Tensor, ids: Tensor, *, normalize: bool, least: float = 0.0, scaling: float = 1.0) -> Routing:
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=least)
    return _scaled(_ascending(ids, weights), scaling)


def _scaled(routing: Routing, scaling: float) -> Routing:
    return routing if scaling == 1 else Routing(routing.ids, routing.weights * scaling)


def _ascending(ids: Tensor, weights: Tensor) -> Routing:
    ids, order = torch.sort(ids, dim=-1)
    return Routing(ids, weights.gather(-1, order))
