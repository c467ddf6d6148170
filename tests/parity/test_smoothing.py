"""Calibration computes what transformers computes, and smoothing changes not a bit of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from consilium.checkpoint import Checkpoint
from consilium.quantize.calibration import calibrate_layer, embed, read_head
from consilium.quantize.float_layer import FloatLayer
from consilium.smoothing import LARGEST, LayerExponents, fold, head_shifts, layer_shifts
from tests.parity.test_model import LLAMA3
from tests.tiny_models import save_mixtral, save_qwen3_moe

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (save_mixtral, {}),
    "mixtral-tied-window": (save_mixtral, {"tie_word_embeddings": True, "sliding_window": 7}),
    "mixtral-llama3": (save_mixtral, {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "qwen3": (save_qwen3_moe, {"norm_topk_prob": False}),
    "qwen3-some-dense": (save_qwen3_moe, {"mlp_only_layers": [1], "attention_bias": True}),
}


@pytest.fixture(params=SHAPES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save, overrides = SHAPES[request.param]
    saved: Path = save(tmp_path_factory.mktemp(request.param), **overrides)
    return saved


@torch.inference_mode()
def logits(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found: Tensor = model(tokens).logits
    return found


@torch.inference_mode()
def test_calibration_computes_what_transformers_computes(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    config, names = checkpoint.config, checkpoint.names
    tokens = torch.randint(config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(3))
    x = embed(checkpoint, tokens.flatten().tolist())  # [60, D]
    for number in range(config.num_layers):
        layer = FloatLayer(checkpoint, number)
        _, x = calibrate_layer(layer, x, window=30)
    normed = layer.norm(x, checkpoint.tensor(names.final_norm, (config.hidden_size,)))
    found = (normed @ read_head(checkpoint).T).view(2, 30, -1)
    torch.testing.assert_close(found.log_softmax(-1), logits(folder, tokens).log_softmax(-1), rtol=0, atol=1e-4)


def test_a_smoothed_model_computes_the_same_bits(folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder)
    smoothed = shutil.copytree(folder, tmp_path / "smoothed")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = read_head(checkpoint).clone()
    changed = smooth(checkpoint, tensors)
    save_file(tensors, smoothed / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (smoothed / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tokens = torch.randint(checkpoint.config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(4))
    assert torch.equal(logits(smoothed, tokens), logits(folder, tokens))
    untouched = {name for name in tensors if name not in changed}
    expected = ("embed_tokens.weight", "q_norm.weight", "k_norm.weight", "proj.bias", "o_proj.weight")
    assert all(name.endswith(expected) for name in untouched)


def smooth(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> set[str]:
    """Move every channel of ``tensors`` by a random power of two; the names of those that changed."""
    config, random, changed = checkpoint.config, np.random.default_rng(5), set()

    def draw(*shape: int) -> Any:
        return random.integers(-LARGEST, LARGEST, shape, np.int8, endpoint=True)

    shifts = dict(head_shifts(draw(config.hidden_size), checkpoint.names))
    for layer, routes in enumerate(config.moe_layers):
        hidden = draw(config.num_experts, config.expert_size) if routes else draw(1, config.dense_size)
        exponents = LayerExponents(draw(config.hidden_size), draw(config.hidden_size), hidden)
        shifts |= layer_shifts(exponents, config, checkpoint.names, layer)
    for name, shift in shifts.items():
        if name in tensors:
            folded = torch.from_numpy(fold(tensors[name].numpy(), shift))
            assert not torch.equal(folded, tensors[name])
            tensors[name] = folded
            changed.add(name)
    return changed
