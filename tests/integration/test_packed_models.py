"""Quantized checkpoints of other makers, and our own in int4, served by real processes: as an engine in this process.

What the engine here computes comes from the floats that the checkpoint stands for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium.checkpoint import Checkpoint
from consilium.config import Quantization
from consilium.integer_product import find_integer_product
from consilium.quantize.run import quantize
from gateway.arithmetic import Arithmetic
from tests.integration.completions import complete
from tests.local_workers import IntegerRows
from tests.stack import stack
from tests.tiny_models import save_qwen3_moe
from tests.unit.served_engine import Served, greedy, prompt
from tests.unit.test_formats import EXACT, MODELS, repack

PROMPT = prompt(30, 1)
NEW = 24


def expected_tokens(checkpoint: Checkpoint, quantization: Quantization) -> list[int]:
    product = find_integer_product()
    every = range(checkpoint.config.num_experts)
    arithmetic, rows = Arithmetic(torch.float32, product, product), IntegerRows(checkpoint, quantization)
    served = Served(checkpoint, experts=[every], arithmetic=arithmetic, compute=rows)
    return served.run(greedy(0, PROMPT, NEW))[0].tokens


def served_tokens(model: Path, quantization: Quantization) -> list[int]:
    with stack(model, workers=2, quantization=quantization) as running_stack:
        found = complete(running_stack.url, PROMPT, NEW)
    assert found.error is None
    return found.tokens


@pytest.mark.parametrize("name", ["deepseek-v3-fp8", "gpt-oss-mxfp4"])
def test_a_packed_checkpoint_answers_as_its_floats_do(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = MODELS[name](tmp_path)
    expected = expected_tokens(Checkpoint(folder / "twin"), "int8")
    assert len(set(expected)) > 3
    assert served_tokens(folder, "int8") == expected


def test_a_packed_checkpoint_is_served_in_int8_and_in_int4(tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = repack(save_qwen3_moe(tmp_path), *EXACT["packed"])
    assert served_tokens(folder, "int8") == expected_tokens(Checkpoint(folder / "twin"), "int8")
    assert served_tokens(folder, "int4") == expected_tokens(Checkpoint(folder), "int4")


def test_a_model_that_consilium_wrote_in_int4(tmp_path: Path) -> None:
    quantize(save_qwen3_moe(tmp_path / "model"), tmp_path / "int4", int4=True)
    assert served_tokens(tmp_path / "int4", "int4") == expected_tokens(Checkpoint(tmp_path / "int4"), "int4")
