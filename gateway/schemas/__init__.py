"""Request bodies: strict, bounded, and refusing what they do not know."""

from gateway.schemas.base import Body, parse_body
from gateway.schemas.chat import ChatBody, TemplateBody
from gateway.schemas.completions import CompletionBody
from gateway.schemas.sampling import SamplingBody, check_token_ids
from gateway.schemas.tokens import DetokenizeBody, TokenizeBody

__all__ = [
    "Body",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "SamplingBody",
    "TemplateBody",
    "TokenizeBody",
    "check_token_ids",
    "parse_body",
]
