"""transformers on the CPU: greedy, with its KV cache, as `generate` would, but timed without the prompt."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench.peers.figures import Figure, Plan
from consilium.models import resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP_TOKENS = 2

console = Console(stderr=True)


@torch.inference_mode()
def measure(model: str, plan: Plan, folder: Path) -> Iterator[Figure]:  # noqa: ARG001 (every peer's)
    """Both dtypes, one repeat after the other. Raises ConfigError when ``model`` is not there."""
    torch.set_num_threads(plan.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name, dtype in DTYPES.items():
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(resolve_model(model)), dtype=dtype).eval()
        peer = f"transformers {transformers.__version__} {name}"
        vocabulary = loaded.config.vocab_size
        _decode(loaded, _prompt(vocabulary, 1, plan.context), WARMUP_TOKENS)
        for repeat in range(plan.repeats):
            console.print(f"{peer}, {model}: repeat {repeat + 1} of {plan.repeats}")
            yield Figure(peer, model, "prefill", 1, [_prefill(loaded, _prompt(vocabulary, 1, plan.prompt))])
            for batch in plan.batches:
                prompt = _prompt(vocabulary, batch, plan.context)
                yield Figure(peer, model, "decode", batch, [_decode(loaded, prompt, plan.tokens)])
        del loaded
        gc.collect()


def _prompt(vocabulary: int, batch: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


def _prefill(model: Any, prompt: Tensor) -> float:
    """Prompt tokens per second; logits of the last position only, as a server needs them."""
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return prompt.numel() / (time.perf_counter() - start)


def _decode(model: Any, prompt: Tensor, tokens: int) -> float:
    """Tokens per second of all the sequences together, after the prompt."""
    out = model(prompt, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(tokens):
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)  # [B, 1]
        out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
    return prompt.shape[0] * tokens / (time.perf_counter() - start)
