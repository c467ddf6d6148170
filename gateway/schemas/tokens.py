"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import FailFast, Field, model_validator

from consilium.errors import InvalidRequest
from gateway.schemas.base import Body
from gateway.schemas.chat import MAX_MESSAGES, Message, TemplateBody


class TokenizeBody(TemplateBody):
    """A text, or messages as the chat endpoint takes them."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        return self


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = Field(None, max_length=512)
    tokens: Annotated[list[int], FailFast()]
    skip_special_tokens: bool = False
