"""What the student is taught by: the teacher's distribution and the text itself.

Letters: N positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as nn
from torch import Tensor

# Positions whose logits are in memory at a time.
CHUNK = 8192
# The target of a position that predicts nothing: the last of a block.
NO_TARGET = -100


class Losses(NamedTuple):
    """Sums over positions, in nats."""

    divergence: Tensor  # KL of the teacher from the student at the temperature, times its square (Hinton et al. 2015)
    cross_entropy: Tensor


def distillation(student: Tensor, teacher: Tensor, targets: Tensor, head: Tensor, temperature: float) -> Losses:
    """For normed hidden states [N, D] of both in front of the same head [V, D], and targets [N]."""
    mine, theirs = nn.linear(student, head).float(), nn.linear(teacher, head).float()  # [N, V]
    cross_entropy = nn.cross_entropy(mine, targets, ignore_index=NO_TARGET, reduction="sum")
    mine, theirs = (mine / temperature).log_softmax(-1), (theirs / temperature).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - mine)).sum()
    return Losses(divergence * temperature**2, cross_entropy)


def gradient_of_hidden(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    weight: Callable[[Losses], Tensor],
    compute: Callable[[Tensor, Tensor, Tensor], Losses],
) -> tuple[Tensor, Losses]:
    """The gradient [N, D] of ``weight(losses)`` by the student's hidden states, and the losses; chunk by chunk.

    Logits of all positions at once would take more memory than everything else together.
    """
    gradients, found = [], []
    for start in range(0, len(student), CHUNK):
        part = slice(start, start + CHUNK)
        leaf = student[part].detach().requires_grad_()
        losses = compute(leaf, teacher[part], targets[part])
        (gradient,) = torch.autograd.grad(weight(losses), leaf)
        gradients.append(gradient)
        found.append(Losses(losses.divergence.detach(), losses.cross_entropy.detach()))
    total = Losses(*(torch.stack(each).sum() for each in zip(*found, strict=True)))
    return torch.cat(gradients), total


def next_tokens(blocks: Tensor) -> Tensor:
    """The targets [B * L] of blocks [B, L]: each next token, nothing after the last."""
    return nn.pad(blocks[:, 1:].long(), (0, 1), value=NO_TARGET).reshape(-1)
