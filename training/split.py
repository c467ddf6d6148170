"""Shares the neurons of an FFN out among experts, and makes a first gate for them.

Neurons that fire for the same tokens are gathered into slices (MoEfication, Zhang et al. 2022). Each slice becomes a
pair of experts: one with the neurons that matter most where the slice's gate is positive, the other where it is
negative; neurons that always matter are in both (LLaMA-MoE's neuron sharing, Zhu et al. 2024). The two have opposite
logits, so that the K = E / 2 best of all E experts are one of each pair, and no neuron counts twice: a first student
that is nearly the teacher.
Letters: N tokens, D hidden size, F FFN size, E experts, S neurons of an expert, C neurons of a slice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.errors import ConfigError
from training.coactivation import Activity, said

# Rounds of k-means, and of choosing a pair's neurons and tokens in turn.
ROUNDS = 12
PAIR_ROUNDS = 5
# Standard deviation of the first gate's logits. Few tokens have logits many times that; weights must stay nearly even
# for them, too: at 0.2 the untrained student diverges by 0.8 nats, at 0.01 by 0.3.
GATE_SPREAD = 0.02
_RIDGE = 1e-3


class Split(NamedTuple):
    """The experts of a layer, one behind the other."""

    neurons: Tensor  # [E, S] the dense model's neurons, ascending in each expert
    router: Tensor  # [E, D] float32


def split_layer(activity: Activity, slices: Tensor, pairs: int, size: int, shared: int = 0) -> Split:
    """``pairs`` pairs of experts of ``size`` neurons each, for slices [F] that say where each neuron belongs.

    The ``shared`` neurons of a slice that say most over all tokens are in both of its experts. One of the two is always
    chosen, so those of all slices together are a shared expert that costs no call of its own.
    """
    energy = said(activity).square()  # [N, F]
    energy /= energy.sum(1, keepdim=True)
    inputs = activity.inputs.float()
    fit = Ridge(inputs)
    neurons, routers = [], []
    for number in range(pairs):
        members = (slices == number).nonzero()[:, 0]  # [C]
        plus, minus, direction = split_slice(energy[:, members], inputs, fit, size, shared)
        neurons += [members[plus], members[minus]]
        routers += [direction, -direction]
    return Split(torch.stack(neurons), torch.stack(routers))


def split_slice(
    energy: Tensor, inputs: Tensor, fit: Ridge, size: int, shared: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The neurons of both experts (each [S], ascending) and the gate's direction [D], for one slice's energy [N, C]."""
    centred = energy.sqrt() - energy.sqrt().mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors  # [C, C] by rising eigenvalue
    lead = centred @ axes[:, -1]  # [N] how far a token is on the first one's side
    for _ in range(PAIR_ROUNDS):
        plus, minus = _both_best(energy, lead > lead.median(), size, shared)
        lead = energy[:, plus].sum(1) - energy[:, minus].sum(1)
    direction = fit.balanced(lead)
    plus, minus = _both_best(energy, inputs @ direction > 0, size, shared)
    return plus, minus, direction


def _both_best(energy: Tensor, positive: Tensor, size: int, shared: int) -> tuple[Tensor, Tensor]:
    """The ``size`` neurons that say most on each side, ascending; the ``shared`` that say most at all are on both."""
    always = energy.sum(0).topk(shared).indices
    sides = [energy[side].sum(0).index_fill(0, always, torch.inf) for side in (positive, ~positive)]
    plus, minus = (side.topk(size).indices.sort().values for side in sides)
    return plus, minus


class Ridge:
    """Ridge regression on the same inputs [N, D], for many targets."""

    def __init__(self, inputs: Tensor) -> None:
        gram = inputs.T @ inputs
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        self._inputs, self._factor = inputs, torch.linalg.cholesky(gram)
        self._constant = self._solve(inputs.new_ones(len(inputs)))  # what comes nearest to 1 for every token

    def balanced(self, target: Tensor) -> Tensor:
        """The direction [D] that predicts target [N], positive for about half of the tokens, of moderate length."""
        direction = self._solve((target - target.mean()) / target.std().clamp(min=1e-20))
        logits = self._inputs @ direction
        direction = direction - logits.median() * self._constant
        return direction * (GATE_SPREAD / (self._inputs @ direction).std())

    def _solve(self, target: Tensor) -> Tensor:
        return torch.cholesky_solve((self._inputs.T @ target)[:, None], self._factor)[:, 0]


def random_split(activity: Activity, pairs: int, size: int, generator: torch.Generator) -> Split:
    """The baseline: slices, neurons and directions by chance, of the same sizes."""
    count, hidden = activity.hidden.shape[1], activity.inputs.shape[1]
    check_even(count, pairs)
    neurons, routers = [], []
    for members in torch.randperm(count, generator=generator).chunk(pairs):
        direction = torch.randn(hidden, generator=generator)
        direction = direction.to(activity.inputs.device)
        direction *= GATE_SPREAD / (activity.inputs.float() @ direction).std()
        for sign in (1, -1):
            chosen = members[torch.randperm(len(members), generator=generator)[:size]]
            neurons.append(chosen.sort().values)
            routers.append(sign * direction)
    return Split(torch.stack(neurons).to(activity.inputs.device), torch.stack(routers))


def check_even(size: int, parts: int) -> None:
    """Raises ConfigError where the neurons cannot be shared evenly."""
    if size % parts:
        raise ConfigError(f"{size} neurons cannot be shared evenly by {parts} slices; choose a divisor of {size}")


def balanced_clusters(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means [F, N] -> [F] with clusters of one size (Euclidean distance)."""
    check_even(len(points), clusters)
    starts = torch.randperm(len(points), generator=generator)[:clusters].to(points.device)
    centres = points[starts]
    for _ in range(ROUNDS):
        # Nearest is: largest 2·x·c - |c|²; |x|² is the same for every cluster.
        nearness = 2 * points @ centres.T - centres.square().sum(1)
        cluster_of = match_evenly(nearness)
        members = nn.one_hot(cluster_of, clusters).T.to(points.dtype)  # [clusters, F]
        centres = members @ points / members.sum(1, keepdim=True)
    return cluster_of


def match_evenly(nearness: Tensor) -> Tensor:
    """The cluster of each point for nearness [F, C], F / C points in each, so that no two would rather swap.

    Deferred acceptance (Gale and Shapley 1962): points ask their best cluster, clusters keep the nearest they have
    room for, and who is turned away asks the next.
    """
    points, clusters = nearness.shape
    room = points // clusters
    wanted = nearness.clone()
    while True:
        asked = wanted.argmax(1)  # [F]
        offers = torch.where(nn.one_hot(asked, clusters).bool(), nearness, -torch.inf)
        kept = torch.zeros_like(offers, dtype=torch.bool).scatter(0, offers.topk(room, dim=0).indices, True)
        turned_away = ~kept.gather(1, asked[:, None])[:, 0]
        if not turned_away.any():
            return asked
        wanted[turned_away, asked[turned_away]] = -torch.inf


def captured(activity: Activity, split: Split) -> float:
    """Which part of what all neurons say, squared, the experts that the gate chooses still say; a mean over tokens."""
    energy = said(activity).square()
    energy /= energy.sum(1, keepdim=True)
    logits = activity.inputs.float() @ split.router.T  # [N, E]
    chosen = logits >= logits.topk(len(split.router) // 2, dim=1).values[:, -1:]
    kept = torch.zeros_like(energy)
    for expert, neurons in enumerate(split.neurons):
        kept[:, neurons] = torch.maximum(kept[:, neurons], chosen[:, expert, None].float())
    return float((energy * kept).sum(1).mean())
