"""The fields that /v1/completions and /v1/chat/completions share, every one with its bounds."""

from __future__ import annotations

import secrets
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from consilium.errors import InvalidRequest
from gateway.messages import Caller, SamplingParams
from gateway.schemas.base import Body

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_TOKENS = 2**31 - 1
MAX_RESUMED = 2**20
MAX_PRIORITY = 1000  # lower is earlier
MAX_USER_CHARACTERS = 512

_SEED_BITS = 63
_GREEDY_BELOW = 1e-4  # dividing logits by less overflows, and the likeliest token wins anyway
_LEAST_TOP_P = 1e-9  # clients send 0 and mean "only the likeliest"


def _stop_list(value: object) -> object:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


def _few_biases(value: object) -> object:
    """Counted before the values are looked at: each wrong one costs an error object."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens can be biased, not {len(value)}")
    return value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """What a streaming client asks for beside the tokens."""

    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool = False


class SamplingBody(Body):
    """How the next token is chosen, when to stop, and how to answer."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention"}
    )
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        "use_beam_search": (False,),
        "length_penalty": (1.0,),
        "early_stopping": (False,),
        "spaces_between_special_tokens": (True,),
        "truncate_prompt_tokens": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "structured_outputs": (),
    }

    model: str | None = Field(None, max_length=512)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(_few_biases)] = Field({})
    stop: Annotated[list[Stop], BeforeValidator(_stop_list)] = Field([], max_length=MAX_STOPS)
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool = False
    return_token_ids: bool = False
    consilium_resume_tokens: list[int] = Field([], max_length=MAX_RESUMED)
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    user: str = Field("", max_length=MAX_USER_CHARACTERS)
    safety_identifier: str = Field("", max_length=MAX_USER_CHARACTERS)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed together with stream", param="stream_options")
        return self

    def resumed(self, max_tokens: int, vocab_size: int, prompts: int = 1) -> list[int]:
        """The tokens that the client has already, of a stream that broke. Raises InvalidRequest."""
        tokens, key = self.consilium_resume_tokens, "consilium_resume_tokens"
        if not tokens:
            return []
        if self.n * prompts > 1:
            raise InvalidRequest(f"{key} is for a request with one prompt and one choice; send each alone", param=key)
        if self.seed is None and self.temperature >= _GREEDY_BELOW:
            raise InvalidRequest(f"{key} needs the seed of the stream that broke, or temperature 0", param=key)
        if len(tokens) >= max_tokens:
            raise InvalidRequest(f"{key} has {len(tokens)} tokens, and max_tokens is {max_tokens}: it ended", param=key)
        return check_token_ids(tokens, vocab_size, key)

    def caller(self, api_key: str) -> Caller:
        """Whose request it is: `safety_identifier` is OpenAI's newer word for `user`."""
        return Caller(api_key, self.safety_identifier or self.user, self.priority)

    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(
        self, max_tokens: int, vocab_size: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """These fields as the engine takes them; a missing seed is drawn here, so that the log can name it.

        Raises InvalidRequest for token ids outside the vocabulary, and for more minimum than maximum tokens.
        """
        if self.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, above max_tokens {max_tokens}", param="min_tokens")
        seed = secrets.randbits(_SEED_BITS) if self.seed is None else self.seed & (2**_SEED_BITS - 1)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if self.temperature < _GREEDY_BELOW else self.temperature,
            top_k=max(0, self.top_k),
            top_p=max(self.top_p, _LEAST_TOP_P),
            min_p=self.min_p,
            seed=seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self._biases(vocab_size),
            stop_token_ids=tuple(check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _biases(self, vocab_size: int) -> dict[int, float]:
        try:
            biases = {int(token): bias for token, bias in self.logit_bias.items()}
        except ValueError:
            raise InvalidRequest("logit_bias: the keys must be token ids", param="logit_bias") from None
        check_token_ids(list(biases), vocab_size, "logit_bias")
        return biases


def check_token_ids(tokens: list[int], vocab_size: int, key: str) -> list[int]:
    """The same ids, once all are seen to be in the vocabulary. Raises InvalidRequest that names one that is not."""
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"{key}: token id {wrong} is not in the vocabulary (0 to {vocab_size - 1})", param=key)
    return tokens
