"""The gate while it learns: which experts a token gets, with what weight, and what keeps all of them in use.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# An expert that gets less than this part of the even share has nothing left to learn from.
DEAD_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What balances the load; 0 and None switch each off."""

    top_k: int
    aux_weight: float = 0.0  # λ of λ·E·Σ f_i·P_i (Fedus et al. 2021, Switch Transformers)
    z_weight: float = 0.0  # of the router z-loss (Zoph et al. 2022, ST-MoE)
    noise: float = 0.0  # standard deviation added to the logits (Shazeer et al. 2017)
    bias_rate: float = 0.0  # step of the bias without auxiliary loss (DeepSeek-AI 2024, DeepSeek-V3)
    capacity: float | None = None  # an expert takes at most this times T·K/E tokens (GShard, Switch Transformers)


class Gated(NamedTuple):
    """What the gate made of T tokens."""

    mix: Tensor  # [T, E] K times the weight of each expert, 0 where it is not chosen: 1 on average over the chosen
    load: Tensor  # [E] the part of all T·K choices that each expert got
    loss: Tensor  # scalar: the balancing losses with their weights


def gate(logits: Tensor, bias: Tensor, options: GateOptions) -> Gated:
    """Softmax over the K chosen logits [T, E], as Mixtral serves it. ``bias`` [E] moves the choice, not the weights."""
    logits = logits.float()
    if options.noise:
        logits = logits + options.noise * torch.randn_like(logits)
    chosen = choose(logits + bias, options.top_k)
    weights = torch.softmax(logits.masked_fill(~chosen, -torch.inf), dim=-1)
    load = chosen.float().mean(0) / options.top_k
    loss = options.aux_weight * balance_loss(logits, load) + options.z_weight * z_loss(logits)
    if options.capacity is not None:
        weights = weights * within_capacity(logits, chosen, options.capacity, options.top_k)
    return Gated(weights * options.top_k, load, loss)


def choose(scores: Tensor, top_k: int) -> Tensor:
    """Whether each expert is among the K best: [T, E] bool."""
    ids = scores.topk(top_k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)


def balance_loss(logits: Tensor, load: Tensor) -> Tensor:
    """E·Σ f_i·P_i: 1 where choices f [E] and mean probabilities P are even, up to E where one expert gets all."""
    return logits.shape[1] * (load.detach() * torch.softmax(logits, dim=-1).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean square of log Σ exp: keeps logits small."""
    return logits.logsumexp(-1).square().mean()


def within_capacity(logits: Tensor, chosen: Tensor, factor: float, top_k: int) -> Tensor:
    """Which choices [T, E] an expert still takes: its highest logits, up to ``factor`` times the even share."""
    tokens, experts = logits.shape
    places = min(tokens, math.ceil(factor * tokens * top_k / experts))
    scores = logits.masked_fill(~chosen, -torch.inf)
    best = scores.topk(places, dim=0).indices  # [places, E]
    return torch.zeros_like(chosen).scatter(0, best, True) & chosen


def moved_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """DeepSeek-V3's step: up by ``rate`` for experts below the even share, down for those above. Any shape […, E]."""
    return bias + rate * torch.sign(1 / load.shape[-1] - load)


def collapsed(load: Tensor) -> list[int]:
    """The layers of load [layers, E] where at least half of the experts are as good as dead."""
    dead = load < DEAD_SHARE / load.shape[1]
    return [layer for layer, count in enumerate(dead.sum(1).tolist()) if 2 * count >= load.shape[1]]
