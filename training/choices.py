"""Multiple choice by likelihood: the continuation a model finds likeliest, and how two models differ on the same items.

Letters: L tokens of an item, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Encode = Callable[[str], list[int]]
# Logits [1, L, V] for tokens [1, L].
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Item:
    """One question."""

    context: str
    choices: Sequence[str]
    right: int


@torch.inference_mode()
def is_right(item: Item, encode: Encode, logits: Logits, device: torch.device) -> bool:
    """Whether the choice with the highest log-likelihood a character is the right one."""
    context = encode(item.context)
    scores = []
    for choice in item.choices:
        continuation = encode(" " + choice)
        tokens = torch.tensor(context + continuation, device=device)
        found = logits(tokens[None, :-1])[0, -len(continuation) :].float().log_softmax(-1)
        likelihood = found.gather(1, tokens[-len(continuation) :, None]).sum()
        scores.append(float(likelihood) / len(choice))
    return int(np.argmax(scores)) == item.right


def paired_difference(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> tuple[float, float, float]:
    """Points that ``first`` is ahead on the same items, and the bounds of the 95 % bootstrap interval of that."""
    differences = np.array(first, float) - np.array(second, float)
    draws = np.random.default_rng(seed).integers(0, len(differences), (10_000, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), (0.025, 0.975))
    return 100 * float(differences.mean()), 100 * float(low), 100 * float(high)
