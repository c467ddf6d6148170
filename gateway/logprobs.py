"""Log-probabilities as the two OpenAI APIs write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.messages import TokenLogprobs
from gateway.vocabulary import Vocabulary

# JSON has no -Infinity; this is what OpenAI's server writes for a token that cannot be.
_IMPOSSIBLE = -9999.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a choice's text. A prompt's first token follows nothing, so it has no log-probability."""

    token: int
    logprobs: TokenLogprobs | None
    offset: int  # in characters of the choice's text


@dataclass(frozen=True, slots=True)
class LogprobsFormat:
    """Writes token ids as text, or as ``token_id:N`` for clients that must tell tokens of equal text apart."""

    vocabulary: Vocabulary
    alternatives: int  # how many of the likeliest tokens are shown beside the chosen one
    as_token_ids: bool = False

    def completion(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Four parallel lists. The chosen token is always among its `top_logprobs`, likely or not."""
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [
                None if entry.logprobs is None else _finite(entry.logprobs.logprob) for entry in entries
            ],
            "top_logprobs": [None if entry.logprobs is None else self._by_name(entry.logprobs) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def chat(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """One object per token, with the bytes that the token stands for."""
        return {"content": [self._chat_token(entry.logprobs) for entry in entries if entry.logprobs is not None]}

    def prompt(self, tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: one mapping per prompt token, by token id; null for the first.

        A token outside the likeliest ones has no known rank: null.
        """
        return [None, *(self._by_id(token) for token in tokens)]

    def _chat_token(self, token: TokenLogprobs) -> dict[str, Any]:
        top = [self._chat_alternative(other, logprob) for other, logprob in self._top(token)]
        return {**self._chat_alternative(token.token, _finite(token.logprob)), "top_logprobs": top}

    def _chat_alternative(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": logprob, "bytes": list(self.vocabulary.token_bytes(token))}

    def _by_name(self, token: TokenLogprobs) -> dict[str, float]:
        # Different tokens can have the same text; the likelier one, which comes first, keeps the name.
        named: dict[str, float] = {}
        for other, logprob in (*self._top(token), (token.token, _finite(token.logprob))):
            named.setdefault(self._name(other), logprob)
        return named

    def _by_id(self, token: TokenLogprobs) -> dict[str, Any]:
        ranked: dict[str, Any] = {
            str(other): {"logprob": logprob, "rank": rank, "decoded_token": self.vocabulary.token_text(other)}
            for rank, (other, logprob) in enumerate(self._top(token), start=1)
        }
        chosen = {
            "logprob": _finite(token.logprob),
            "rank": None,
            "decoded_token": self.vocabulary.token_text(token.token),
        }
        ranked.setdefault(str(token.token), chosen)
        return ranked

    def _top(self, token: TokenLogprobs) -> list[tuple[int, float]]:
        shown = list(zip(token.top_tokens, token.top_logprobs, strict=True))[: self.alternatives]
        return [(other, _finite(logprob)) for other, logprob in shown]

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_token_ids else self.vocabulary.token_text(token)


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
