"""What transformers says of a prompt: log-probabilities and a greedy continuation, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

# Closer than this, two tokens are a tie that rounding may decide either way.
TIE = 1e-3


class Oracle:
    """A checkpoint as transformers runs it."""

    def __init__(self, model: Any) -> None:
        """``model`` is a causal language model of transformers, in float32."""
        self._model = model

    @classmethod
    def load(cls, folder: Path) -> Oracle:
        """The checkpoint in ``folder``."""
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), V] of the distribution after each token."""
        return torch.log_softmax(self._model(torch.tensor([tokens])).logits[0].float(), dim=-1)

    def prompt_logprobs(self, tokens: list[int]) -> list[float]:
        """Of each token but the first."""
        rows = self.logprobs(tokens)
        return [float(rows[position, token]) for position, token in enumerate(tokens[1:])]

    @torch.inference_mode()
    def expert_rows(self, tokens: list[int]) -> torch.Tensor:
        """[layers, E]: how many of the tokens the gate of each layer sends to each expert."""
        top_k = self._model.config.num_experts_per_tok
        gates = self._model(torch.tensor([tokens]), output_router_logits=True).router_logits
        return torch.stack([gate.topk(top_k).indices.flatten().bincount(minlength=gate.shape[1]) for gate in gates])

    def assert_greedy(self, prompt: list[int], continuation: list[int]) -> int:
        """That every token was the likeliest, up to the first tie. Returns how many were compared."""
        rows = self.logprobs(prompt + continuation)[len(prompt) - 1 : -1]
        for position, (row, token) in enumerate(zip(rows, continuation, strict=True)):
            best, second = row.topk(2).values.tolist()
            if best - second < TIE:
                return position
            assert token == int(row.argmax()), f"token {position} of {prompt} is {token}, not {int(row.argmax())}"
        return len(continuation)
