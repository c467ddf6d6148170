"""Messages to a prompt, with the model's own template in a sandbox. A client never sends a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from consilium.errors import CheckpointError, InvalidRequest
from consilium.shapes.folder import ShapeFolder
from gateway.tokenizer import Tokenizer

# What a template sees from us; a request's chat_template_kwargs cannot replace these, nor any `…_token`.
RESERVED = frozenset({"messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now"})
_DEFAULT = "default"


class _GenerationTag(Extension):
    """``{% generation %}`` marks what a training run learns from; when serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance's attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The template of one model. Raises CheckpointError where it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, **(special_tokens or {})
        )
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            where = f"{error.message} (line {error.lineno})"
            raise CheckpointError(f"the model's chat template is not valid Jinja: {where}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included.

        With ``continue_final_message`` it ends where the last message's content ends, so that the model goes on with
        it. Raises InvalidRequest with the template's own words where the template refuses the messages.
        """
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            text = self._template.render(**{**(extra or {}), **ours})
        except Exception as error:  # a template is a program: it may fail in any way
            refusal = f"the model's chat template refuses these messages: {error}"
            raise InvalidRequest(refusal, param="messages") from None
        return _cut_after(text, str(messages[-1]["content"]).strip()) if continue_final_message else text


def load_chat_template(folder: Path | ShapeFolder, tokenizer: Tokenizer) -> ChatTemplate | None:
    """chat_template.jinja, else the one in tokenizer_config.json (of several, the one called default); None without."""
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text("utf-8") if file.is_file() else _named_default(tokenizer.settings.get("chat_template"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    if source is None:
        return None
    tokens = {name: tokenizer.special_token(name) for name in tokenizer.settings if name.endswith("_token")}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _named_default(stated: object) -> str | None:
    if stated is None or isinstance(stated, str):
        return stated
    for each in stated if isinstance(stated, list) else ():
        if isinstance(each, dict) and each.get("name") == _DEFAULT and isinstance(each.get("template"), str):
            return str(each["template"])
    raise CheckpointError(f"tokenizer_config.json: chat_template has no template named {_DEFAULT!r}")


def _cut_after(text: str, content: str) -> str:
    at = text.rfind(content) if content else -1
    if at < 0:
        raise InvalidRequest(
            "continue_final_message needs a last message whose content the chat template shows unchanged",
            param="continue_final_message",
        )
    return text[: at + len(content)]


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Jinja's own tojson escapes <, > and & for HTML, which a model has never seen."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
