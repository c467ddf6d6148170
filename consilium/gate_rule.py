"""How a model's gate chooses K of E experts and weighs them: what consilium.gate needs to know. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scores = Literal["softmax", "sigmoid", "top_k_softmax", "sparsemixer"]


@dataclass(frozen=True, slots=True)
class GateRule:
    """The published gates differ in these alone; consilium.gate has each as a function, with its source."""

    scores: Scores = "softmax"  # of the logits; top_k_softmax is that of the K chosen logits alone
    normalize: bool = True  # the K weights sum to one, before they are scaled
    least_sum: float = 0.0  # what normalizing divides by at least
    scaling: float = 1.0  # of the weights, at last
    logit_bias: bool = False  # the gate is a linear layer with a bias
    correction: bool = False  # a bias for each expert, which the choice sees and the weights do not
    groups: int = 1  # of neighbouring experts, of which only
    top_groups: int = 1  # the best take part
    group_members: int = 1  # how many of a group's best scores are added up to its own
    jitter: float = 0.0  # sparsemixer: how far below the best score others still count
