"""What a running stack says over HTTP, held against the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.parity.oracle import Oracle


@dataclass(frozen=True)
class Served:
    """A running stack and what transformers makes of the same folder."""

    url: str
    oracle: Oracle

    def complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        body = {"prompt": prompt, "temperature": 0, **options}
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def check_prompt(self, prompt: list[int]) -> None:
        reported = self.complete(prompt, max_tokens=0, echo=True, logprobs=1)["logprobs"]["token_logprobs"]
        assert reported[0] is None
        assert reported[1:] == pytest.approx(self.oracle.prompt_logprobs(prompt), abs=1e-4)

    def check_continuation(self, prompt: list[int], new_tokens: int = 12) -> None:
        options = {"max_tokens": new_tokens, "logprobs": 0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        tokens = self.complete(prompt, **options)["logprobs"]["tokens"]
        continuation = [int(token.removeprefix("token_id:")) for token in tokens]
        assert len(continuation) == new_tokens
        assert self.oracle.assert_greedy(prompt, continuation) > 0
