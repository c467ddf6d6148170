"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PlainValidator, model_validator

from consilium.errors import InvalidRequest
from gateway.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, SamplingBody

MAX_PROMPTS = 4096

_FORMS = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids"


def _prompt_list(value: object) -> object:
    """Every form of a prompt as a list of prompts, each text or token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts in a request, not {len(value)}", param="prompt")
    if not isinstance(value, list) or not value or not all(isinstance(each, str) or _is_ids(each) for each in value):
        raise InvalidRequest(_FORMS, param="prompt")
    if len({type(each) for each in value}) > 1:
        raise InvalidRequest(f"{_FORMS}, not a mixture", param="prompt")
    return value


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class CompletionBody(SamplingBody):
    """Text that goes on where the prompt ends."""

    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {**SamplingBody.unsupported, "suffix": ("",)}

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompt_list)]
    max_tokens: int = Field(16, ge=0, le=MAX_TOKENS)
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(
                f"best_of is not supported here; leave it out (it may only equal n, which is {self.n})", param="best_of"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs is not available in a stream; use echo", param="prompt_logprobs")
        return self

    def wanted_prompt_logprobs(self) -> int | None:
        """How many alternatives per prompt token the engine computes; None for no log-probabilities of the prompt."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((each for each in wanted if each is not None), default=None)
