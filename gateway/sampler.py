"""From logits to the next tokens. Each row by itself: what else is in the batch changes nothing.

Letters: S rows, one for each sequence, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consilium import parallel
from consilium.kernels import sampling as kernel
from gateway.messages import TokenLogprobs
from gateway.sequence import Sequence

WORTH_OF_A_DRAW = 32  # bytes of weights, for parallel, that are read in the time a draw spends on one logit


def choose(logits: Tensor, sequences: list[Sequence], eos_token_ids: tuple[int, ...]) -> list[int]:
    """The next token of each sequence from its logits [S, V] float32; -1 where they are not finite."""
    logits = logits.contiguous()
    tokens = _largest(logits)
    special = [row for row, sequence in enumerate(sequences) if tokens[row] >= 0 and not greedy(sequence)]
    if special:
        rows = [_adjusted(logits[row], sequences[row], eos_token_ids) for row in special]
        for row, token in zip(special, _draw(rows, [sequences[row] for row in special]), strict=True):
            tokens[row] = token
    return tokens


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: Philox (Salmon et al. 2011), counter-based."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[position, choice, 0, 0]))
    return float(generator.random())


def token_logprobs(logprobs: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
    """What to report of rows of log-probabilities [S, V]: the token's, and of the ``count`` likeliest, ties by id."""
    top = np.zeros((len(tokens), max(counts, default=0)), np.int64)
    for row, (own, count) in enumerate(zip(logprobs, counts, strict=True)):
        if count:
            kernel.likeliest(own.data_ptr(), len(own), count, top[row].ctypes.data)
    values = logprobs.gather(1, torch.from_numpy(top)).tolist()
    own_values = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return [
        TokenLogprobs(token, value, top[row, :count].tolist(), values[row][:count])
        for row, (token, value, count) in enumerate(zip(tokens, own_values, counts, strict=True))
    ]


def _largest(logits: Tensor) -> list[int]:
    """The lowest id of each row's largest logit; -1 where one is not finite."""
    rows, size = logits.shape
    found = torch.empty(rows, dtype=torch.int64)

    def work(sharer: parallel.Sharer) -> None:
        kernel.largest(logits.data_ptr(), rows, size, found.data_ptr(), sharer)

    parallel.share(work, 1, min(rows, parallel.count_slices(logits.nbytes)))
    tokens: list[int] = found.tolist()
    return tokens


def _draw(rows: list[Tensor], sequences: list[Sequence]) -> list[int]:
    """A token of each row [V], as its sequence asks for."""
    size = len(rows[0])
    places = np.array([row.data_ptr() for row in rows], np.int64)
    asked = [sequence.sampling for sequence in sequences]
    limits = np.array([(each.temperature, each.min_p, each.top_p) for each in asked], np.float32)
    top_k = np.array([each.top_k if each.top_k > 0 else size for each in asked], np.int64)
    numbers = np.array([uniform(each.sampling.seed or 0, each.choice, each.generated) for each in sequences])
    found = np.empty(len(rows), np.int64)

    def work(sharer: parallel.Sharer) -> None:
        kernel.draw(places, size, limits, top_k, numbers, found.ctypes.data, sharer)

    parallel.share(work, 1, min(len(rows), parallel.count_slices(WORTH_OF_A_DRAW * len(rows) * size)))
    tokens: list[int] = found.tolist()
    return tokens


def greedy(sequence: Sequence) -> bool:
    """Whether its token is the likeliest, as the logits are."""
    return not sequence.sampling.temperature and not adjusts(sequence)


def adjusts(sequence: Sequence) -> bool:
    """Whether anything is added to its logits or taken from them."""
    sampling = sequence.sampling
    penalized = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return bool(penalized or sampling.logit_bias or sequence.generated < sampling.min_tokens)


def _adjusted(logits: Tensor, sequence: Sequence, eos_token_ids: tuple[int, ...]) -> Tensor:
    """With bias and penalties as vLLM defines them, on a copy where anything changes [V]."""
    sampling = sequence.sampling
    if not adjusts(sequence):
        return logits
    logits = torch.from_numpy(logits.numpy().copy())  # torch would wake threads for it, which costs more than it does
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
    for token in (*eos_token_ids, *sampling.stop_token_ids) if sequence.generated < sampling.min_tokens else ():
        logits[token] = -torch.inf
    return logits
