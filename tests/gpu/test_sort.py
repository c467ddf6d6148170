"""Pairs are sorted by expert on the device."""

from __future__ import annotations

import pytest
import torch

from consilium.gpu.sort import CHUNK, Groups, slots_for, sort_pairs


def expected(ids: torch.Tensor, held: torch.Tensor, block: int) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The pairs in order, and the tiles."""
    flat, order, tiles = ids.flatten().tolist(), list[int](), list[tuple[int, int, int]]()
    for expert in held.tolist():
        own = [pair for pair, each in enumerate(flat) if each == expert]
        first = len(order)
        order += own
        tiles += [(expert, first + at, first + min(at + block, len(own))) for at in range(0, len(own), block)]
    return order, tiles


def check(groups: Groups, ids: torch.Tensor, held: torch.Tensor, experts: int) -> None:
    order, tiles = expected(ids, held, groups.block)
    assert groups.target[: len(order)].tolist() == order
    assert groups.source[: len(order)].tolist() == [pair // ids.shape[1] for pair in order]
    assert groups.tiles.shape == (slots_for(ids.numel(), experts, groups.block), 3)
    assert [tuple(each) for each in groups.tiles[: len(tiles)].tolist()] == tiles
    assert all(begin == end for _, begin, end in groups.tiles[len(tiles) :].tolist())


@pytest.mark.parametrize(
    ("tokens", "per_token", "experts", "block"), [(1, 1, 1, 16), (1, 2, 5, 16), (40, 2, 3, 16), (CHUNK, 2, 4, 64)]
)
def test_random_pairs(device: torch.device, tokens: int, per_token: int, experts: int, block: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(experts, (tokens, per_token), generator=generator, dtype=torch.int32)
    table = torch.ones(experts, 9, dtype=torch.int64, device=device)
    check(sort_pairs(ids.to(device), table, block), ids, torch.arange(experts), experts)


def test_what_is_not_held_is_left_out(device: torch.device) -> None:
    ids = torch.randint(8, (30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ids[3], ids[4] = -1, 100  # rows that only fill a batch up
    held = torch.tensor([1, 2, 6])
    table = torch.zeros(8, 9, dtype=torch.int64)
    table[held, 0] = 4096
    check(sort_pairs(ids.to(device), table.to(device), 16), ids, held, 8)


def test_nothing_is_held(device: torch.device) -> None:
    ids = torch.zeros(5, 2, dtype=torch.int32)
    table = torch.zeros(4, 9, dtype=torch.int64)
    check(sort_pairs(ids.to(device), table.to(device), 16), ids, torch.arange(0), 4)
