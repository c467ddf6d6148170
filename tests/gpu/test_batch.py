"""The numbers of a step for the device, and the pages that its sequences have."""

from __future__ import annotations

import pytest
import torch

from consilium.errors import ConfigError
from consilium.model_config import ModelConfig
from consilium.rope_config import RopeConfig
from gateway.batch import Segment, StepRows
from gateway.gpu.batch import BUCKETS, fits_a_graph, numbers_of, shape_of, view
from gateway.gpu.heads import HeadShape
from gateway.gpu.pages import PAGE, PagedCache, PagePool
from gateway.gpu.tiling import Tiling

CPU = torch.device("cpu")
TILING = Tiling(rows=16, keys=16, chunk=32)
HEADS = HeadShape(heads=4, kv_heads=2, size=8, rotated=8, epsilon=1e-6)
CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=512,
    rope=RopeConfig(1e4),
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    num_experts=4,
    top_k=2,
    expert_size=8,
    moe_layers=(True, True),
)
PAGE_BYTES = CONFIG.cached_elements * 4 * PAGE


def pool(pages: int) -> PagePool:
    return PagePool(CONFIG, torch.float32, (pages + 1) * PAGE_BYTES, CPU)


def own(cache: PagedCache) -> list[int]:
    pages: list[int] = cache.pages[: cache.blocks].tolist()
    return pages


def test_pages_have_one_owner_and_come_back() -> None:
    memory = pool(6)
    one, other = memory.allocate(20, 60), memory.allocate(5, 80)
    assert memory.free_blocks == 3
    assert memory.grow(other, 50)
    assert not memory.grow(one, 60)
    assert (one.blocks, one.committed, one.capacity) == (2, 32, 64)
    assert sorted(own(one) + own(other)) == [1, 2, 3, 4, 5, 6]  # 0 is nobody's
    memory.trim(other, 17)
    assert memory.grow(one, 60)
    assert len(set(own(one) + own(other))) == 6
    memory.free(one)
    memory.free(other)
    assert memory.free_blocks == memory.total_blocks == 6


def test_copied_positions_are_in_pages_of_their_own() -> None:
    memory = pool(6)
    one, other = memory.allocate(40, 40), memory.allocate(40, 40)
    for tensor in memory.layer(1):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    memory.copy(one, other, 20)
    for tensor in memory.layer(1):
        assert torch.equal(tensor[own(other)[:2]], tensor[own(one)[:2]])
        assert not torch.equal(tensor[own(other)[2]], tensor[own(one)[2]])


def test_too_little_memory_says_what_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.kv_cache_device_memory: .*two are the least"):
        pool(0)


def test_a_decoding_step_is_filled_up_with_rows_that_write_to_nobodys_page() -> None:
    memory = pool(9)
    caches = [memory.allocate(40, 40) for _ in range(3)]
    segments = [Segment(cache, row, 1, 33 + row) for row, cache in enumerate(caches)]
    batch = StepRows(torch.tensor([7, 8, 9]), segments)
    assert fits_a_graph(batch)
    shape = shape_of(batch, TILING, HEADS, graph=True)
    assert (shape.rows, shape.tiles, shape.sequences, shape.chunks, shape.split) == (4, 4, 4, 2, True)
    step = view(torch.from_numpy(numbers_of(batch, shape)), shape)
    assert step.tokens.tolist() == [7, 8, 9, 7]
    assert step.positions.tolist() == [33, 34, 35, 33]
    assert step.slots.tolist() == [*(own(cache)[2] * PAGE + 1 + row for row, cache in enumerate(caches)), 0]
    assert step.tiles.table.tolist() == [[0, 1, 33, 0], [1, 1, 34, 1], [2, 1, 35, 2], [3, 1, 33, 0]]
    assert step.tiles.pages[2, :3].tolist() == own(caches[2])


def test_a_step_with_prompts_has_the_size_that_it_has() -> None:
    memory = pool(9)
    long, short = memory.allocate(60, 60), memory.allocate(5, 5)
    batch = StepRows(torch.arange(26), [Segment(long, 0, 25, 30), Segment(short, 25, 1, 4)])
    assert not fits_a_graph(batch)
    shape = shape_of(batch, TILING, HEADS, graph=False)  # tiles of 8 positions
    assert (shape.rows, shape.tiles, shape.sequences, shape.chunks, shape.blocks) == (26, 5, 2, 2, 4)
    step = view(torch.from_numpy(numbers_of(batch, shape)), shape)
    assert step.tiles.table[-2:].tolist() == [[24, 1, 54, 0], [25, 1, 4, 1]]
    assert step.slots.tolist()[:2] == [own(long)[1] * PAGE + 14, own(long)[1] * PAGE + 15]
    kinds = (step.tokens, step.positions, step.slots, step.tiles.table, step.tiles.pages, step.live)
    assert [each.storage_offset() % 4 for each in kinds] == [0] * 6  # of 16 bytes: kernels are made for that
    assert not fits_a_graph(StepRows(torch.arange(BUCKETS[-1] + 1), [batch.segments[0]] * (BUCKETS[-1] + 1)))
