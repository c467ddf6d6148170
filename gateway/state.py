"""What every route needs."""

from __future__ import annotations

from dataclasses import dataclass

from consilium.config import Config
from consilium.errors import InvalidRequest
from gateway.choice import Prompt
from gateway.engine_client import EngineClient
from gateway.metrics import Metrics
from gateway.served_model import ServedModel


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway: its model, its engine and its metrics."""

    config: Config
    model: ServedModel
    engine: EngineClient
    metrics: Metrics

    def context(self) -> int:
        """Most tokens that one sequence may have: what the model knows, and what fits into the KV cache."""
        status = self.engine.status
        return self.model.max_model_len if status is None else min(self.model.max_model_len, status.kv_tokens_total)

    def check_count(self, sequences: int) -> None:
        """Raise InvalidRequest for more sequences than could ever run together."""
        capacity = self.engine.capacity
        if sequences > capacity:
            raise InvalidRequest(
                f"this request asks for {sequences} sequences (prompts × n), but this gateway holds at most "
                f"{capacity} at once; send fewer prompts per request",
                param="prompt",
            )

    def check_length(self, prompt: Prompt, max_tokens: int) -> None:
        """Raise InvalidRequest, with the numbers, for a prompt that is empty or leaves no room for ``max_tokens``."""
        if not prompt.ids:
            raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
        if len(prompt.ids) + max_tokens > self.context():
            raise InvalidRequest(
                f"the prompt has {len(prompt.ids)} tokens and max_tokens is {max_tokens}, but the context holds "
                f"{self.context()} in all; shorten the prompt or ask for fewer tokens",
                param="max_tokens",
            )

    async def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[Prompt]:
        """The prompts' ids. Raises InvalidRequest for a text that is too long to be worth encoding."""
        tokenizer = self.model.tokenizer
        for text in texts:
            fewest = tokenizer.fewest_tokens(text)
            if fewest > self.context():
                raise InvalidRequest(
                    f"the prompt has more than {fewest} tokens, but the context holds {self.context()}; shorten it",
                    param="prompt",
                )
        ids = await tokenizer.encode(texts, add_special_tokens)
        return [Prompt(each, text) for each, text in zip(ids, texts, strict=True)]
