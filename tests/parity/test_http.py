"""The whole path against transformers: HTTP, engine, gRPC, 1 to 3 expert workers, alone and in a mixed batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.parity.oracle import Oracle
from tests.parity.served import Served
from tests.stack import stack
from tests.tiny_models import save_deepseek_v3, save_gpt_oss, save_mixtral, save_qwen3_moe

VOCABULARY = 384

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (save_mixtral, {}),
    "mixtral-odd": (save_mixtral, {"hidden_size": 72, "head_dim": 10, "num_local_experts": 5}),
    "qwen3": (save_qwen3_moe, {}),
    "qwen3-sparse-step": (save_qwen3_moe, {"decoder_sparse_step": 2, "num_hidden_layers": 4, "num_experts_per_tok": 3}),
    "deepseek-v3": (save_deepseek_v3, {}),
    "gpt-oss": (save_gpt_oss, {}),
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    save, overrides = SHAPES[request.param]
    folder = save(tmp_path_factory.mktemp(request.param) / "tiny", **overrides)
    return folder, Oracle.load(folder)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda count: f"{count}-workers")
def served(request: pytest.FixtureRequest, model: tuple[Path, Oracle]) -> Iterator[Served]:
    folder, oracle = model
    with stack(folder, workers=request.param, quantization="none", dtype="float32") as running:
        yield Served(running.url, oracle)


def prompts(count: int) -> list[list[int]]:
    generator = random.Random(count)
    return [[generator.randrange(VOCABULARY) for _ in range(generator.randint(2, 70))] for _ in range(count)]


def test_alone(served: Served) -> None:
    for prompt in prompts(3):
        served.check_prompt(prompt)
        served.check_continuation(prompt)


def test_in_a_mixed_batch(served: Served) -> None:
    with ThreadPoolExecutor(16) as pool:
        checks = [pool.submit(served.check_prompt, prompt) for prompt in prompts(6)]
        checks += [pool.submit(served.check_continuation, prompt) for prompt in prompts(10)]
        for check in checks:
            check.result()
