"""The next tokens from logits on the device. What only the CPU's kernels know goes there, row by row.

Letters: S rows, one for each sequence, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gateway import sampler
from gateway.gpu.sampling import draw, largest
from gateway.sequence import Sequence


def choose(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
    """The next token of each sequence from its logits [S, V] float32; -1 where they are not finite."""
    values, ids = largest(logits)
    tokens: list[int] = ids.tolist()
    special = [row for row, each in enumerate(sequences) if tokens[row] >= 0 and not sampler.greedy(each)]
    plain = [row for row in special if _drawn_here(sequences[row], logits.shape[1])]
    for row, token in zip(plain, _draw(logits, values, plain, sequences), strict=True):
        tokens[row] = token
    others = [row for row in special if not _drawn_here(sequences[row], logits.shape[1])]
    if others:
        found = sampler.choose(logits[others].cpu(), [sequences[row] for row in others], eos_token_ids)
        for row, token in zip(others, found, strict=True):
            tokens[row] = token
    return tokens


def warm_up(logits: Tensor) -> None:
    """Compile what choosing from [S, V] needs."""
    values, _ = largest(logits)
    limits = torch.ones(len(logits), 2, device=logits.device)
    draw(logits, values, limits, torch.zeros(len(logits), dtype=torch.float64, device=logits.device))


def _drawn_here(sequence: Sequence, vocabulary: int) -> bool:
    """Whether nothing but temperature and min_p decides."""
    sampling = sequence.sampling
    unlimited = not 0 < sampling.top_k < vocabulary and sampling.top_p >= 1
    return bool(sampling.temperature) and unlimited and not sampler.adjusts(sequence)


def _draw(logits: Tensor, largest_values: Tensor, rows: list[int], sequences: list[Sequence]) -> list[int]:
    """A token of each of these rows."""
    if not rows:
        return []
    asked = [sequences[row] for row in rows]
    limits = np.array([(each.sampling.temperature, each.sampling.min_p) for each in asked], np.float32)
    numbers = np.array([sampler.uniform(each.sampling.seed or 0, each.choice, each.generated) for each in asked])
    here = [torch.from_numpy(each).to(logits.device) for each in (limits, numbers)]
    tokens: list[int] = draw(logits[rows], largest_values[rows], *here).tolist()
    return tokens
