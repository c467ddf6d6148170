"""Gates as pure functions: which experts a token goes to, and with what weight.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """The K experts of every token, ascending by id, so that whatever walks over K has one fixed order."""

    ids: Tensor  # [T, K] int64
    weights: Tensor  # [T, K] float32


def softmax_top_k(logits: Tensor, top_k: int, *, normalize: bool) -> Routing:
    """Softmax over all E experts [T, E], then the K largest (Mixtral and Qwen3-MoE as published).

    ``normalize`` rescales the chosen weights to sum to one. Equal scores go to the lower id: a stable sort, since
    ``torch.topk`` breaks ties arbitrarily.
    """
    scores = torch.softmax(logits.float(), dim=-1)  # [T, E]
    values, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], ids[:, :top_k]  # [T, K]
    if normalize:
        values = values / values.sum(dim=-1, keepdim=True)
    ids, order = torch.sort(ids, dim=-1)
    return Routing(ids, values.gather(-1, order))
