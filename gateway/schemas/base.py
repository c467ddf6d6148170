"""What every request body has in common: strict types, bounds, and errors that name the key."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from consilium.errors import InvalidRequest

M = TypeVar("M", bound="Body")

_SHOWN_CHARACTERS = 80  # of a wrong value, in an error message


class Body(BaseModel):
    """A JSON object from a client. A null counts as absent, as OpenAI's clients mean it.

    A key that nobody knows is an error: a client that sends one expects something of it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    # Keys that clients send and that change no token: taken and left alone.
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Keys of features that are not offered, with the values that mean "not used".
    unsupported: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and cls._is_wanted(key, value)}

    @classmethod
    def _is_wanted(cls, key: str, value: object) -> bool:
        if key in cls.model_fields:
            return True
        if key in cls.ignored or value in cls.unsupported.get(key, ()):
            return False
        if key in cls.unsupported:
            raise InvalidRequest(f"{key} is not supported here; leave it out", param=key)
        shown = key[:_SHOWN_CHARACTERS]
        near = difflib.get_close_matches(shown, [*cls.model_fields, *cls.unsupported], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise InvalidRequest(f"unknown key {shown!r}: {hint}", param=shown)


def parse_body(model: type[M], content: bytes) -> M:
    """``content`` as a ``model``. Raises InvalidRequest that names the key and the value."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidRequest(_explain(key, dict(first)), param=key or None) from None


def _explain(key: str, error: dict[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}"
    if not key:
        return f"the body must be a JSON object: {message}"
    value = error["input"]
    shown = f" (got {value!r})" if isinstance(value, int | float) else ""
    if isinstance(value, str):
        shown = f" (got {value[:_SHOWN_CHARACTERS]!r})"
    return f"{key}: {message}{shown}"
