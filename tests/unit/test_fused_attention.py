"""A layer up to its experts in one kernel against the same one step after the other: equal to the last bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium import parallel
from consilium.checkpoint import Checkpoint
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.rope import Rope
from gateway.attention import Attention
from gateway.batch import Batch, Segment
from gateway.fused_attention import FusedAttention
from gateway.kv_cache import KVCache, KVPool
from gateway.linear import LinearMaker
from gateway.norm import RMSNorm
from tests.tiny_models import save_mixtral, save_qwen3_moe

MODELS: dict[str, Any] = {
    "window": (save_mixtral, {"hidden_size": 72, "num_attention_heads": 4, "sliding_window": 20}),
    "biases": (save_qwen3_moe, {"attention_bias": True}),
    "one head for all": (save_qwen3_moe, {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 10}),
}


@cache
def checkpoint(name: str) -> Checkpoint:
    save, overrides = MODELS[name]
    return Checkpoint(save(Path(mkdtemp(prefix="consilium-fused-")), num_hidden_layers=2, **overrides))


@cache
def product() -> IntegerProduct:
    return find_integer_product()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=8)
@given(
    steps=st.lists(st.lists(st.integers(1, 7), min_size=3, max_size=3), min_size=1, max_size=4),
    threads=st.integers(1, 3),
)
def test_the_same_bits_as_one_after_the_other(
    name: str, dtype: torch.dtype, steps: list[list[int]], threads: int
) -> None:
    source = checkpoint(name)
    norms = [RMSNorm(source, template.format(layer=1), torch.float32) for template in norm_names(source)]
    attention = Attention(source, 1, LinearMaker(torch.float32, product()))
    fused = FusedAttention(norms[0], attention, norms[1], product())
    pool = KVPool(source.config, dtype, 2**24)
    together, apart = ([pool.allocate(32, 32) for _ in range(3)] for _ in range(2))
    generator, position = torch.Generator().manual_seed(sum(map(sum, steps))), [0, 0, 0]
    for lengths in steps:
        x = torch.randn(sum(lengths), source.config.hidden_size, generator=generator)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "count_slices", lambda _: threads)
            y, normed = fused.forward(x, batch(source, together, lengths, position))
        expected = x + attention.forward(norms[0].forward(x), batch(source, apart, lengths, position))
        assert torch.equal(y, expected)
        assert torch.equal(normed, norms[1].forward(expected))
        position = [before + length for before, length in zip(position, lengths, strict=True)]
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def norm_names(source: Checkpoint) -> tuple[str, str]:
    return source.names.input_norm, source.names.post_norm


def batch(source: Checkpoint, caches: list[KVCache], lengths: list[int], position: list[int]) -> Batch:
    segments, row = [], 0
    for cache_, length, start in zip(caches, lengths, position, strict=True):
        segments.append(Segment(cache_, row, length, start))
        row += length
    at = torch.cat([torch.arange(each.position, each.position + each.length) for each in segments])
    cos, sin = Rope(source.config).tables(at)
    return Batch(torch.zeros(row, dtype=torch.int64), segments, cos, sin)


def test_float_projections_are_not_fused() -> None:
    source = checkpoint("window")
    norm: Any = RMSNorm(source, norm_names(source)[0].format(layer=0), torch.float32)
    floats = Attention(source, 0, LinearMaker(torch.float32, None))
    with pytest.raises(TypeError, match="int8"):
        FusedAttention(norm, floats, norm, product())


def test_many_rows_go_the_other_way() -> None:
    source = checkpoint("window")
    norm = RMSNorm(source, norm_names(source)[0].format(layer=0), torch.float32)
    attention = Attention(source, 0, LinearMaker(torch.float32, product()))
    limit = product().many_rows
    fused = FusedAttention(norm, attention, norm, IntegerProduct(product().kind, lambda x, w: x @ w.T))
    assert [fused.takes(rows) for rows in (1, limit - 1, limit)] == [True, True, False]
    everything = FusedAttention(norm, attention, norm, IntegerProduct(product().kind, None))
    assert everything.takes(limit)
