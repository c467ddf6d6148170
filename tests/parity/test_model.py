"""Hidden states to logits against transformers, in one process: prefill in chunks, then decode, for odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from consilium.checkpoint import Checkpoint
from consilium.integer_product import find_integer_product
from gateway.arithmetic import Arithmetic
from gateway.batch import Segment
from gateway.kv_cache import KVPool
from gateway.mailbox import Mailbox
from gateway.model import Model
from tests.local_workers import Compute, IntegerRows, local_dispatcher
from tests.tiny_models import (
    save_deepseek,
    save_deepseek_v2,
    save_deepseek_v3,
    save_ernie4_5_moe,
    save_glm4_moe,
    save_gpt_oss,
    save_granitemoe,
    save_minimax_m2,
    save_mixtral,
    save_olmoe,
    save_phimoe,
    save_qwen2_moe,
    save_qwen3_moe,
)

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}
SCALED = {"mscale": 0.7, "mscale_all_dim": 1.2}

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (save_mixtral, {}),
    "mixtral-odd-sizes": (save_mixtral, {"hidden_size": 72, "num_local_experts": 5, "head_dim": 10}),
    "mixtral-top1-tied": (save_mixtral, {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "mixtral-all-experts": (save_mixtral, {"num_experts_per_tok": 4}),
    "mixtral-window": (save_mixtral, {"sliding_window": 7}),
    "mixtral-linear": (save_mixtral, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mixtral-llama3": (save_mixtral, {"rope_parameters": LLAMA3}),
    "mixtral-yarn": (save_mixtral, {"rope_parameters": YARN, "head_dim": 16}),
    "qwen3": (save_qwen3_moe, {}),
    "qwen3-sparse-step": (save_qwen3_moe, {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3-some-dense": (save_qwen3_moe, {"mlp_only_layers": [1], "norm_topk_prob": False}),
    "qwen3-tied-window": (
        save_qwen3_moe,
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9, "attention_bias": True},
    ),
    "olmoe": (save_olmoe, {"num_key_value_heads": 4}),
    "olmoe-clipped": (save_olmoe, {"clip_qkv": 0.7, "norm_topk_prob": True}),
    "qwen2": (save_qwen2_moe, {}),
    "qwen2-window": (
        save_qwen2_moe,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "mlp_only_layers": [1]},
    ),
    "deepseek": (save_deepseek, {}),
    "deepseek-v2": (save_deepseek_v2, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "deepseek-v2-lite": (save_deepseek_v2, {"q_lora_rank": None, "rope_parameters": {**YARN, **SCALED}}),
    "deepseek-v3": (save_deepseek_v3, {}),
    "deepseek-v3-plain-queries": (save_deepseek_v3, {"q_lora_rank": None}),
    "deepseek-v3-yarn": (
        save_deepseek_v3,
        {
            "rope_parameters": {**YARN, **SCALED},
            "attention_bias": True,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "gpt-oss": (save_gpt_oss, {}),
    "gpt-oss-plain-rope": (save_gpt_oss, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "granite": (save_granitemoe, {}),
    "granite-tied": (save_granitemoe, {"tie_word_embeddings": True, "attention_bias": True}),
    "phimoe": (save_phimoe, {}),
    "phimoe-window": (save_phimoe, {"sliding_window": 9, "attention_bias": False, "lm_head_bias": False}),
    "phimoe-longrope": (save_phimoe, {"rope_parameters": LONGROPE}),
    "ernie": (save_ernie4_5_moe, {}),
    "ernie-untied": (save_ernie4_5_moe, {"tie_word_embeddings": False, "moe_layer_end_index": 1}),
    "glm4": (save_glm4_moe, {}),
    "glm4-groups": (save_glm4_moe, {"n_group": 4, "topk_group": 2, "use_qk_norm": False, "attention_bias": False}),
    "minimax-m2": (save_minimax_m2, {}),
    "qwen3-yarn-scaled": (save_qwen3_moe, {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
}


@pytest.fixture(params=SHAPES, scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save, overrides = SHAPES[request.param]
    saved: Path = save(tmp_path_factory.mktemp(request.param), **overrides)
    return saved


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected(folder: Path, tokens: Tensor) -> Tensor:
    """Log-probabilities [2, 40, V] by transformers."""
    twin = folder / "twin"  # of a family that transformers lacks
    reference = AutoModelForCausalLM.from_pretrained(twin if twin.is_dir() else folder, dtype=torch.float32).eval()
    found: Tensor = torch.log_softmax(reference(tokens).logits.float(), dim=-1)
    return found


def test_log_probabilities_equal_transformers(folder: Path, tokens: Tensor, expected: Tensor) -> None:
    found = log_probabilities(Checkpoint(folder), tokens, Arithmetic(torch.float32))
    assert (found - expected).abs().max() < 1e-4
    assert (expected[0, 1:] - expected[0, :-1]).abs().max() > 1  # the reference does tell positions apart


def test_int8_is_close(folder: Path, tokens: Tensor, expected: Tensor) -> None:
    """Closer than another position's would be by far: weights that were reordered or scaled are quantized rightly."""
    checkpoint, product = Checkpoint(folder), find_integer_product()
    arithmetic = Arithmetic(torch.float32, product, product)
    found = log_probabilities(checkpoint, tokens, arithmetic, IntegerRows(checkpoint))
    assert (found - expected).norm() < 0.4 * (expected - expected.roll(1, 1)).norm()


@torch.inference_mode()
def log_probabilities(
    checkpoint: Checkpoint, tokens: Tensor, arithmetic: Arithmetic, compute: Compute | None = None
) -> Tensor:
    """[2, 40, V] by ours, in a batch of both sequences."""
    config = checkpoint.config
    mailbox = Mailbox(lambda event: pytest.fail(f"unexpected {event}"))
    odd, even = range(1, config.num_experts, 2), range(0, config.num_experts, 2)
    replies = torch.float32 if compute is None else torch.bfloat16
    dispatcher, _ = local_dispatcher(checkpoint, mailbox, [odd, even], compute, replies)
    model = Model(checkpoint, arithmetic, dispatcher)
    pool = KVPool(config, torch.float32, 2**24)

    caches = [pool.allocate(40, 40) for _ in tokens]
    found = torch.empty(*tokens.shape, config.vocab_size)
    # Two sequences of the same batch: chunks of unequal length, single tokens, and one alone at the end.
    for first, second in [
        ((0, 13), (0, 1)),
        ((13, 14), (1, 30)),
        ((14, 38), (30, 31)),
        ((38, 40), (31, 31)),
        ((40, 40), (31, 40)),
    ]:
        segments: list[Segment] = []
        ids: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for sequence, (start, stop) in enumerate((first, second)):
            if start < stop:
                segments.append(Segment(caches[sequence], len(ids), stop - start, start))
                spans.append((sequence, start, stop))
                ids += tokens[sequence, start:stop].tolist()
        logits = model.logits(mailbox.drive(model.forward(model.batch(ids, segments))))
        for segment, (sequence, start, stop) in zip(segments, spans, strict=True):
            rows = logits[segment.row : segment.row + segment.length]
            found[sequence, start:stop] = torch.log_softmax(rows, dim=-1)
    return found
