"""The default model as served, in float32, against the dense SmolLM2 that it is made from, as transformers runs it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from consilium.default_model import fetch_default
from tests.parity.oracle import Oracle
from tests.parity.served import Served
from tests.smollm2 import PROMPTS, load_dense
from tests.stack import stack

TOKENS = 64


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    oracle = Oracle(load_dense(tmp_path_factory.mktemp("smollm2")))
    with stack(fetch_default(), workers=2, quantization="none", dtype="float32") as running:
        yield Served(running.url, oracle)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(Path(fetch_default()) / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids[:TOKENS] for prompt in PROMPTS]


def test_log_probabilities_alone(served: Served, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        assert len(prompt) == TOKENS
        served.check_prompt(prompt)


def test_greedy_continuations_in_one_batch(served: Served, prompts: list[list[int]]) -> None:
    with ThreadPoolExecutor(len(prompts)) as pool:
        checks = [pool.submit(served.check_continuation, prompt) for prompt in prompts]
        for check in checks:
            check.result()
