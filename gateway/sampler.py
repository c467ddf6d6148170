"""From logits to the next token. Each row by itself: what else is in the batch changes nothing.

Letters: V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gateway.messages import SamplingParams, TokenLogprobs
from gateway.sequence import Sequence


def sample(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> int:
    """The next token of ``sequence`` from its logits [V] float32."""
    sampling = sequence.sampling
    logits = _adjust(logits, sequence, eos_token_ids)
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = _restrict(logits / sampling.temperature, sampling)
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)  # [V]
    threshold = uniform(sampling.seed or 0, sequence.choice, sequence.generated) * cumulative[-1]
    return int(torch.searchsorted(cumulative, threshold, right=True).clamp(max=_last_possible(logits)))


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: Philox (Salmon et al. 2011), counter-based."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[position, choice, 0, 0]))
    return float(generator.random())


def token_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprobs:
    """What to report of one row [V] of log-probabilities: the token's, and the ``count`` likeliest, ties by id."""
    top_tokens: list[int] = []
    if count:
        threshold = logprobs.topk(count).values[-1]
        candidates = torch.nonzero(logprobs >= threshold).flatten()  # ascending ids
        order = torch.sort(logprobs[candidates], descending=True, stable=True).indices[:count]
        top_tokens = candidates[order].tolist()
    return TokenLogprobs(token, float(logprobs[token]), top_tokens, logprobs[top_tokens].tolist())


def _adjust(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Tensor:
    """Bias and penalties as vLLM defines them, on a copy where anything changes [V]."""
    sampling = sequence.sampling
    forbidden: list[int] = []
    if sequence.generated < sampling.min_tokens:
        forbidden = [*eos_token_ids, *sampling.stop_token_ids]
    penalized = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    if not (forbidden or sampling.logit_bias or penalized):
        return logits
    logits = logits.clone()
    if sampling.logit_bias:
        logits[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.repetition_penalty != 1.0:  # of everything seen, the prompt too (Keskar et al. 2019)
        seen = sorted(set(sequence.tokens))
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if sequence.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.tensor(list(sequence.counts.values()), dtype=torch.float32)
        logits[list(sequence.counts)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if forbidden:
        logits[forbidden] = -torch.inf
    return logits


def _restrict(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Take out what min_p, top_k and top_p leave no chance [V]."""
    if sampling.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    if not (0 < sampling.top_k < logits.numel()) and sampling.top_p >= 1:
        return logits
    values, order = torch.sort(logits, descending=True, stable=True)
    if 0 < sampling.top_k < logits.numel():
        values[sampling.top_k :] = -torch.inf
    if sampling.top_p < 1:  # the smallest set of likeliest tokens that holds top_p (Holtzman et al. 2020)
        before = torch.softmax(values, dim=-1).cumsum(-1).roll(1)
        before[0] = 0
        values = values.masked_fill(before >= sampling.top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(0, order, values)


def _last_possible(logits: Tensor) -> int:
    """The highest id with a chance: where rounding puts the threshold past the end of the sum."""
    return int(torch.nonzero(logits > -torch.inf)[-1])
