"""How much a way to compute costs in accuracy: every mode against `none`, on the same text, with the engine's model.

A text is cut into windows that know nothing of each other; in each, every token but the first is predicted. Perplexity
is exp of the mean negative log-likelihood; agreement is the share of positions whose likeliest token is that of the
reference; divergence is the mean Kullback-Leibler divergence of the reference from the mode, in nats.
Letters: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic as find_expert_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import Config, DenseQuantization, GatewayConfig, Quantization, RowDType
from consilium.errors import CheckpointError, ConfigError
from gateway.arithmetic import find_arithmetic
from gateway.batch import Segment
from gateway.kv_cache import BLOCK, KVPool, blocks_for
from gateway.local_experts import LocalExperts, run_now
from gateway.model import Model


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to compute a model."""

    name: str
    experts: Quantization
    dense: DenseQuantization = "none"

    def config(self, dtype: RowDType) -> Config:
        """The deployment that computes so."""
        gateway = GatewayConfig(dense_quantization=self.dense)
        return Config(quantization=self.experts, dtype=dtype, gateway=gateway)


REFERENCE = Mode("none", "none")
MODES = (
    REFERENCE,
    Mode("int8", "int8", "int8"),
    Mode("int8-experts", "int8"),
    Mode("int8-weight-only", "int8-weight-only"),
    Mode("int4", "int4", "int8"),
    Mode("int4-experts", "int4"),
)


@dataclass(slots=True)
class Score:
    """What a mode made of the text so far; sums over ``positions`` predictions."""

    mode: str
    positions: int = 0
    loss: float = 0.0
    agreed: int = 0
    diverged: float = 0.0
    seconds: float = 0.0

    def add(self, logits: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """Count logits and the reference's log-probabilities [T - 1, V], which predict ``tokens`` [T - 1]."""
        found = logits.log_softmax(dim=-1)
        self.positions += len(tokens)
        self.loss -= float(found.gather(1, tokens[:, None]).double().sum())
        self.agreed += int((found.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        self.diverged += float((reference.exp() * (reference - found)).sum(dim=-1).double().sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.positions)

    @property
    def agreement(self) -> float:
        return self.agreed / self.positions

    @property
    def divergence(self) -> float:
        return self.diverged / self.positions


class Evaluated:
    """A model in one mode, all of it in this process."""

    def __init__(self, checkpoint: Checkpoint, mode: Mode, dtype: RowDType) -> None:
        config = checkpoint.config
        of_experts = find_expert_arithmetic(
            mode.experts, mode.config(dtype).reply_dtype, config.hidden_size, config.expert_size
        )
        self._config, self._arithmetic = config, find_arithmetic(mode.config(dtype), config)
        self._model = Model(checkpoint, self._arithmetic, LocalExperts(checkpoint, of_experts))

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[T, V] float32 after each token of one window."""
        config, dtype = self._config, self._arithmetic.dtype
        pool = KVPool(config, dtype, blocks_for(len(tokens)) * BLOCK * config.cached_elements * dtype.itemsize)
        segment = Segment(pool.allocate(len(tokens), len(tokens)), 0, len(tokens), 0)
        batch = self._model.batch(list(tokens), [segment])
        return self._model.logits(run_now(self._model.forward(batch)))


def evaluate(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    modes: Sequence[Mode],
    windows: Sequence[Sequence[int]],
    dtype: RowDType,
    advance: Callable[[], None] = lambda: None,
) -> list[Score]:
    """The scores of ``modes`` of a model against ``reference`` in `none`; the reference's own comes first.

    ``advance`` is called after each window of each mode. Raises ConfigError and CheckpointError.
    """
    if checkpoint.config.vocab_size != reference.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder} has a vocabulary of {checkpoint.config.vocab_size} tokens, the reference "
            f"{reference.folder} one of {reference.config.vocab_size}; they are not the same model"
        )
    others = [mode for mode in modes if mode != REFERENCE]
    scores = [Score(REFERENCE.name), *(Score(mode.name) for mode in others)]
    models = [Evaluated(reference, REFERENCE, dtype), *(Evaluated(checkpoint, mode, dtype) for mode in others)]
    for window in windows:
        expected = torch.tensor(window[1:])
        base: Tensor | None = None
        for score, model in zip(scores, models, strict=True):
            start = time.perf_counter()
            logits = model.logits(window)[:-1]
            score.seconds += time.perf_counter() - start
            base = logits.log_softmax(dim=-1) if base is None else base
            score.add(logits, base, expected)
            advance()
    return scores


def find_modes(names: Sequence[str]) -> list[Mode]:
    """The modes called ``names``. Raises ConfigError with the list of those there are."""
    known = {mode.name: mode for mode in MODES}
    for name in names:
        if name not in known:
            raise ConfigError(f"--modes: there is no mode {name!r}; choose from {', '.join(known)}")
    return [known[name] for name in names]


def split_windows(tokens: Sequence[int], length: int) -> Iterator[Sequence[int]]:
    """Windows of ``length`` tokens; a rest too short to predict anything is left out."""
    for start in range(0, len(tokens), length):
        if len(tokens) - start > 1:
            yield tokens[start : start + length]
