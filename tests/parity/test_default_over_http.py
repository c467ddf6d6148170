"""The default model as served, in float32, against the same folder as transformers runs it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from consilium.default_model import fetch_default
from tests.parity.oracle import Oracle
from tests.parity.served import Served
from tests.smollm2 import PROMPTS
from tests.stack import stack

TOKENS = 64


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = fetch_default()
    settings = tmp_path_factory.mktemp("config") / "consilium.yaml"
    settings.write_text("gateway: {metrics_all_experts: true}")
    with stack(folder, 2, quantization="none", dtype="float32", gateway_args=("--config", str(settings))) as running:
        yield Served(running.url, Oracle.load(folder))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(Path(fetch_default()) / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids[:TOKENS] for prompt in PROMPTS]


def test_log_probabilities_alone(served: Served, prompts: list[list[int]]) -> None:
    for prompt in prompts[:7]:  # all 10 are in the batch below
        assert len(prompt) == TOKENS
        served.check_prompt(prompt)


def test_greedy_continuations_in_one_batch(served: Served, prompts: list[list[int]]) -> None:
    with ThreadPoolExecutor(len(prompts)) as pool:
        checks = [pool.submit(served.check_continuation, prompt) for prompt in prompts]
        for check in checks:
            check.result()


def test_metrics_show_which_experts_transformers_chooses(served: Served) -> None:
    """Half of each layer's experts for a token, and not the same for every token."""
    text = "A gate that chooses is seen in the figures: some experts get many of these tokens, and others get few."
    tokens = Tokenizer.from_file(str(fetch_default() / "tokenizer.json")).encode(text).ids
    before = _rows(served.url)
    served.complete(tokens, max_tokens=1)
    expected = served.oracle.expert_rows(tokens)  # [30, 16]
    assert expected.sum(1).tolist() == [8 * len(tokens)] * 30
    assert ((expected > 0).sum(1) > 8).all(), "not the same 8 experts for every token"
    deadline = time.monotonic() + 30
    while (found := _rows(served.url) - before).sum() < expected.sum() and time.monotonic() < deadline:
        time.sleep(0.05)  # reports are sent now and then
    assert found.tolist() == expected.tolist()


def _rows(url: str) -> torch.Tensor:
    """Rows of every expert of every layer so far, [30, 16]."""
    rows = torch.zeros(30, 16, dtype=torch.int64)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            if sample.name == "consilium_expert_rows_total":
                rows[int(sample.labels["layer"]), int(sample.labels["expert"])] = int(sample.value)
    return rows
