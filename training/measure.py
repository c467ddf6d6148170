"""What a model is worth on held-out blocks: perplexity, divergence from the original teacher, the experts' loads.

Letters: N blocks, L tokens of a block, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from training.gates import GateOptions
from training.llama import Dense, hidden_states
from training.losses import distillation, next_tokens
from training.student import Student, student_states

# Normed hidden states [B, L, D] of tokens [B, L], and the load of every layer's experts [layers, E] where it routes.
States = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One model on one corpus."""

    perplexity: float
    divergence: float  # mean KL of the teacher from the model, nats
    positions: int


def dense_states(model: Dense) -> States:
    """Of a dense model."""
    return lambda tokens: (hidden_states(model, tokens), None)


def served_states(student: Student, top_k: int) -> States:
    """Of a student as it is served: with nothing of what helped it learn, in float32."""
    options = GateOptions(top_k)

    def states(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        hard = torch.ones((), device=tokens.device)
        found, gates = student_states(student, tokens, hard, options, torch.float32)
        return found, torch.stack([gated.load for gated in gates]) if gates else None

    return states


@torch.inference_mode()
def measure(model: States, teacher: States, blocks: Tensor, head: Tensor, batch: int) -> tuple[Figures, Tensor | None]:
    """Figures over blocks [N, L], and the mean load [layers, E]."""
    divergence, loss, loads = 0.0, 0.0, []
    for part in blocks.split(batch):
        states, load = model(part)
        found = distillation(states.flatten(0, 1), teacher(part)[0].flatten(0, 1), next_tokens(part), head, 1.0)
        divergence, loss = divergence + float(found.divergence), loss + float(found.cross_entropy)
        loads += [] if load is None else [load * len(part)]
    positions = blocks.shape[0] * (blocks.shape[1] - 1)
    figures = Figures(math.exp(loss / positions), divergence / blocks.numel(), positions)
    return figures, torch.stack(loads).sum(0) / len(blocks) if loads else None


def as_table(figures: dict[str, Figures]) -> dict[str, dict[str, float]]:
    """For JSON, rounded to what the sample supports."""
    return {name: {key: round(value, 4) for key, value in asdict(each).items()} for name, each in figures.items()}
