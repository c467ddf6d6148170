"""Whether a GPU computes the gateway's half of a model, and what is said where it cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch

from consilium.config import Config
from consilium.errors import ConfigError
from consilium.families import parse_config
from consilium.model_config import ModelConfig
from consilium.shapes.sizes import SHAPES
from gateway.device import uses_gpu

MODEL = parse_config(SHAPES["tiny"])


def config(device: str, **settings: Any) -> Config:
    gateway = {"device": device, **settings.pop("gateway", {})}
    return Config.model_validate({"gateway": gateway, **settings})


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())


@pytest.mark.usefixtures("_gpu")
def test_a_gpu_that_is_there_is_used() -> None:
    assert [uses_gpu(config(device), MODEL) for device in ("auto", "cuda", "cpu")] == [True, True, False]


def test_without_a_gpu_only_those_who_ask_for_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not uses_gpu(config("auto"), MODEL)
    with pytest.raises(ConfigError, match=r"gateway\.device: cuda is not there.* nvidia-smi"):
        uses_gpu(config("cuda"), MODEL)


REFUSED: list[tuple[ModelConfig, dict[str, Any], str]] = [
    (replace(MODEL, family="deepseek_v2"), {}, "does not know deepseek_v2 models, only mixtral, olmoe, qwen3_moe"),
    (MODEL, {"quantization": "none"}, "int8 alone"),
    (MODEL, {"gateway": {"dense_quantization": "none"}}, "int8 alone"),
    (MODEL, {"gateway": {"capacity_factor": 2.0}}, r"gateway\.capacity_factor out"),
]


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("model", "settings", "message"), REFUSED, ids=["family", "experts", "dense", "policy"])
def test_what_kernels_do_not_know_is_refused_or_left_to_the_cpu(
    model: ModelConfig, settings: dict[str, Any], message: str
) -> None:
    assert not uses_gpu(config("auto", **settings), model)
    with pytest.raises(ConfigError, match=message):
        uses_gpu(config("cuda", **settings), model)
