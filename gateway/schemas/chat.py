"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from consilium.errors import InvalidRequest
from gateway.chat_template import RESERVED
from gateway.schemas.base import Body
from gateway.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, SamplingBody

MAX_MESSAGES = 4096
MAX_TEMPLATE_ARGUMENTS = 32


def _text_of(content: object) -> object:
    """Content as one text: parts of type text are joined by line breaks, any other part is refused."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type {kind!r}"[:80] if kind != "text" and kind is not None else "this form"
            raise InvalidRequest(
                f'content parts of {what} are not supported here; send {{"type": "text", "text": "..."}}',
                param="messages",
            )
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Body):
    """One message of the conversation."""

    # What a client sends back when it repeats a message that it got from a server.
    ignored: ClassVar[frozenset[str]] = frozenset({"annotations", "reasoning", "reasoning_content"})
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "refusal": ("",),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of)]
    name: str | None = Field(None, max_length=256)

    def for_template(self) -> dict[str, str]:
        """As chat templates know it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name is not None else {})


class TemplateBody(Body):
    """Messages, and how to write them down for the model."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({}, max_length=MAX_TEMPLATE_ARGUMENTS)

    @model_validator(mode="after")
    def _template_arguments(self) -> TemplateBody:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        taken = [key for key in self.chat_template_kwargs if key in RESERVED or key.endswith("_token")]
        if taken:
            raise InvalidRequest(f"chat_template_kwargs: {taken[0]!r} cannot be set", param="chat_template_kwargs")
        return self

    def prompt_follows(self) -> bool:
        """Whether the prompt ends with the beginning of an answer; by default, unless the last message goes on."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatBody(SamplingBody, TemplateBody):
    """The next message of a conversation."""

    ignored: ClassVar[frozenset[str]] = SamplingBody.ignored | {"parallel_tool_calls"}
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {
        **SamplingBody.unsupported,
        "tools": ([],),
        "tool_choice": ("none", "auto"),  # without tools both mean the same
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
    }

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limits = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send only max_completion_tokens", param="max_tokens"
            )
        return self

    def limit(self) -> int | None:
        """Most tokens of the answer; None is as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def wanted_logprobs(self) -> int | None:
        """How many alternatives per token the engine computes; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None
