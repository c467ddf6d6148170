"""Walks the teacher through sample text, layer by layer, and shows each layer's FFN to whoever asks.

Letters: B blocks, L tokens of a block, N = B·L tokens, D hidden size, F FFN size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as nn
from torch import Tensor

from training.llama import Dense, Matrices, attend, neurons, rms_norm, rope_tables


class Activity(NamedTuple):
    """One layer's FFN over the sample."""

    inputs: Tensor  # [N, D] normed
    hidden: Tensor  # [N, F] what each neuron says
    w: Matrices


@torch.inference_mode()
def walk_layers(model: Dense, tokens: Tensor) -> Iterator[Activity]:
    """The activity of every layer for tokens [B, L], in the model's dtype; one layer in memory at a time."""
    shape = model.shape
    x = model.embed[tokens]
    rope = rope_tables(shape, tokens.shape[1], x.device, x.dtype)
    for norms, w in model.layers:
        x = x + attend(rms_norm(x, norms.attention, shape.rms_norm_eps), w, rope, shape.head_dim)
        inputs = rms_norm(x, norms.ffn, shape.rms_norm_eps).flatten(0, 1)
        hidden = neurons(inputs, w)
        yield Activity(inputs, hidden, w)
        x = x + nn.linear(hidden, w.down).view(x.shape)


def said(activity: Activity) -> Tensor:
    """How much each neuron says to each token, [N, F]: its value times the length of its column of ``down``."""
    lengths: Tensor = activity.w.down.float().norm(dim=0)  # [F]
    return activity.hidden.float().abs() * lengths


def firing(activity: Activity, share: float) -> Tensor:
    """[N, F] 1 where a neuron is among the ``share`` of all that say most to this token, 0 elsewhere."""
    amounts = said(activity)
    least = amounts.kthvalue(max(1, round(amounts.shape[1] * (1 - share))), dim=1, keepdim=True).values
    return (amounts > least).float()
