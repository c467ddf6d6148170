"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from consilium.errors import ConsiliumError
from gateway.kv_cache import KVCache
from gateway.messages import Failure, FinishReason, Generate, Output, SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens of one choice of one request, and how far they are computed."""

    id: int
    choice: int
    sampling: SamplingParams
    tokens: list[int]  # prompt, then what was generated
    prompt_length: int
    computed: int = 0  # tokens whose keys and values are in the cache
    cache: KVCache | None = None
    turn: int = 0  # the last step it was part of
    prompt_reported: int = 1  # prompt tokens whose log-probabilities were sent; the first has none
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    failure: Failure | None = None
    counts: dict[int, int] = field(default_factory=dict)  # of generated tokens, for the penalties
    arrived: float | None = field(default_factory=time.monotonic)  # None once it has run
    queue_seconds: float | None = None  # from arrival to the first step, until it is reported

    @classmethod
    def start(cls, request: Generate) -> Sequence:
        """A sequence of which nothing is computed yet."""
        return cls(request.id, request.choice, request.sampling, list(request.prompt), len(request.prompt))

    @property
    def generated(self) -> int:
        """Tokens generated so far; also the position of the next one in the random numbers' counter."""
        return len(self.tokens) - self.prompt_length

    @property
    def capacity(self) -> int:
        """The longest it can become."""
        return self.prompt_length + self.sampling.max_tokens

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    def append(self, token: int, eos_token_ids: tuple[int, ...]) -> None:
        """Take a generated token and see whether it was the last."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        sampling = self.sampling
        may_stop = self.generated >= sampling.min_tokens
        if may_stop and token in eos_token_ids and not sampling.ignore_eos:
            self.finish_reason, self.stop_reason = "stop", "eos"
        elif may_stop and token in sampling.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", str(token)
        elif self.generated >= sampling.max_tokens:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End with an error."""
        kind = type(error).__name__ if isinstance(error, ConsiliumError) else ConsiliumError.__name__
        self.finish_reason, self.failure = "error", Failure(kind, str(error))

    def leave_queue(self) -> None:
        """Note when the sequence first got to run."""
        if self.arrived is not None:
            self.queue_seconds, self.arrived = time.monotonic() - self.arrived, None

    def news(self) -> Output:
        """An output without anything new yet; the time in the queue goes with the first."""
        seconds, self.queue_seconds = self.queue_seconds, None
        return Output(self.id, queue_seconds=seconds)
