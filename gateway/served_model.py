"""What the HTTP process knows of the model: its name, tokenizer, template and limits. No weights."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from consilium.config import Config
from consilium.errors import ConfigError, InvalidRequest, UnknownModel
from consilium.model_folder import read_model_folder
from consilium.models import resolve_model
from gateway.chat_template import ChatTemplate, load_chat_template
from gateway.schemas import TemplateBody
from gateway.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of this gateway."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    vocab_size: int
    max_model_len: int  # tokens of prompt and completion together
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str | None) -> None:
        """Raise UnknownModel unless ``name`` is this model's, or missing."""
        if name is not None and name != self.name:
            raise UnknownModel(f"the model {name[:80]!r} is not served here; served: {self.name!r}", param="model")

    def render(self, body: TemplateBody) -> str:
        """The messages of ``body`` as this model's chat template writes them. Raises InvalidRequest."""
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self.chat_template.render(
            [message.for_template() for message in body.messages],
            body.prompt_follows(),
            body.continue_final_message,
            body.chat_template_kwargs,
        )


def load_served_model(config: Config) -> ServedModel:
    """Read the small files of the model's folder. Raises ConfigError and CheckpointError, which name the file."""
    path = resolve_model(config.model)
    folder = read_model_folder(path)
    longest = config.gateway.max_model_len or folder.config.max_position
    if longest > folder.config.max_position:
        raise ConfigError(
            f"gateway.max_model_len is {longest}, but the model has only {folder.config.max_position} positions"
        )
    tokenizer = Tokenizer(path, folder.config.vocab_size)
    return ServedModel(
        name=config.gateway.served_model_name or _own_name(config.model),
        tokenizer=tokenizer,
        chat_template=load_chat_template(path, tokenizer),
        vocab_size=folder.config.vocab_size,
        max_model_len=longest,
    )


def _own_name(model: str) -> str:
    """A fetched model's name, or the name of the folder."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model
