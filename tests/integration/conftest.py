"""Models and processes that several tests share; each is made once, when the first test asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import Process, running, worker_argv
from tests.tiny_models import save_mixtral


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 experts in each of 3 layers, D 64, F 48."""
    return save_mixtral(tmp_path_factory.mktemp("mixtral") / "tiny")


@pytest.fixture(scope="session")
def float_worker(tiny_mixtral: Path) -> Iterator[Process]:
    """Experts 0, 1 and 3 of every layer, in float32."""
    with running(worker_argv("0-1,3", "--model", str(tiny_mixtral), "--quantization", "none")) as process:
        yield process


@pytest.fixture(scope="session")
def int8_worker(tiny_mixtral: Path) -> Iterator[Process]:
    """All experts, int8, answering in bfloat16."""
    with running(worker_argv("all", "--model", str(tiny_mixtral), "--dtype", "bfloat16")) as process:
        yield process


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little to send and much to compute: a few thousand rows keep a worker busy for a good part of a second."""
    sizes = {"num_hidden_layers": 1, "num_local_experts": 2, "intermediate_size": 4096}
    return save_mixtral(tmp_path_factory.mktemp("slow") / "slow", **sizes)
