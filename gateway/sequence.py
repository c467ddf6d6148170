"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from consilium.errors import ConsiliumError
from gateway.fair_share import Client
from gateway.kv_cache import Cache
from gateway.messages import Failure, FinishReason, Generate, Output, SamplingParams
from gateway.prefix_cache import Entry, token_key


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens of one choice of one request, and how far they are computed."""

    id: int
    choice: int
    sampling: SamplingParams
    tokens: list[int]  # prompt, then what was generated
    prompt_length: int
    priority: int = 0  # lower is earlier
    client: Client = field(default_factory=Client)
    arrival: int = 0  # its number among all that came
    computed: int = 0  # tokens whose keys and values are in the cache
    cache: Cache | None = None
    key: bytes = b""  # the tokens that it began with, or went on with after it gave way, for the prefix cache
    entry: Entry | None = None  # what others may copy of its cache
    published: int = 0  # bytes of the key that were computed when the entry was made
    reusable: bool = True  # whether its cache is what any other sequence with the same tokens would compute
    overtaken: int = 0  # sequences admitted before it that stood behind it
    turn: int = 0  # the last step it was part of
    prompt_reported: int = 1  # prompt tokens whose log-probabilities were sent; the first has none
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    failure: Failure | None = None
    stood_in: int = 0  # rows of all layers for which something else was done because nobody held an expert
    counts: dict[int, int] = field(default_factory=dict)  # of generated tokens, for the penalties
    arrived: float | None = field(default_factory=time.monotonic)  # None once it has run
    queue_seconds: float | None = None  # from arrival to the first step, until it is reported
    cached_tokens: int | None = None  # of the prompt, not computed at the first step; until it is reported

    @classmethod
    def start(cls, request: Generate, eos_token_ids: tuple[int, ...] = ()) -> Sequence:
        """A sequence of which nothing is computed yet; it may have ended with the tokens that it resumes after."""
        made = cls(
            request.id,
            request.choice,
            request.sampling,
            list(request.prompt),
            len(request.prompt),
            request.caller.priority,
            Client(request.caller.api_key, request.caller.user),
            key=token_key([*request.prompt, *request.resumed]),
        )
        for token in request.resumed:
            made.append(token, eos_token_ids)
        return made

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

    @property
    def reading(self) -> bool:
        """Whether more than the next token is to be computed: of its prompt, or again after it gave way."""
        return self.uncomputed > 1

    @property
    def most_reused(self) -> int:
        """Tokens that need not be computed where they are cached.

        The last one must be, for the next token's sake; and what is reported of the prompt needs its hidden states.
        """
        most = len(self.tokens) - 1
        if self.sampling.prompt_logprobs is None or self.prompt_reported >= self.prompt_length:
            return most
        return min(most, self.prompt_reported - 1)

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

    def restart(self) -> None:
        """Begin again with all the tokens there are: nothing of them is computed any more."""
        self.computed, self.key, self.overtaken = 0, token_key(self.tokens), 0

    def leave_queue(self) -> bool:
        """Note what the sequence found when it first got to run; False when it has run before."""
        if self.arrived is None:
            return False
        self.queue_seconds, self.arrived = time.monotonic() - self.arrived, None
        self.cached_tokens = self.computed
        return True

    def news(self) -> Output:
        """An output without anything new yet; what there is to say of its start goes with the first."""
        seconds, self.queue_seconds = self.queue_seconds, None
        cached, self.cached_tokens = self.cached_tokens, None
        return Output(self.id, queue_seconds=seconds, cached_tokens=cached)
