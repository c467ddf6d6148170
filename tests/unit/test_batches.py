"""Grouping and combining are each other's inverse, in a fixed order."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.gate import Routing, softmax_top_k
from gateway.batches import combine, group_by_expert
from gateway.framing import build_frame
from tests.local_workers import outputs_of


def routing_of(tokens: int, experts: int, top_k: int, seed: int) -> Routing:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return softmax_top_k(logits, top_k, normalize=True)


@given(st.integers(1, 30), st.integers(1, 9), st.data())
def test_frames_cover_every_pair_once(tokens: int, experts: int, data: st.DataObject) -> None:
    routing = routing_of(tokens, experts, data.draw(st.integers(1, experts)), data.draw(st.integers(0, 99)))
    x = torch.randn(tokens, 3)
    batches = group_by_expert(x, None, routing)
    owner = data.draw(st.lists(st.integers(0, 2), min_size=len(batches.experts), max_size=len(batches.experts)))
    outputs = torch.full((len(batches.slots), 3), torch.nan)
    for worker in set(owner):
        frame, pairs = build_frame(0, batches, np.flatnonzero(np.array(owner) == worker))
        assert frame.rows.shape[0] == len(set(frame.indices.tolist()))  # each distinct row once
        # The "expert" adds its id to the row, so that a misplaced row shows.
        ids = torch.repeat_interleave(torch.tensor(frame.experts), torch.tensor(frame.offsets).diff())
        outputs[batches.slots[pairs]] = frame.rows[frame.indices.long()] + ids[:, None]
    expected = x[:, None] + routing.ids[:, :, None]  # [T, K, D]
    assert torch.equal(outputs.view_as(expected), expected)


def test_combine_adds_in_ascending_expert_order() -> None:
    ids = torch.tensor([[0, 1, 2]])
    outputs = outputs_of(torch.tensor([[1e8], [1.0], [-1e8]]))
    assert combine(outputs, Routing(ids, torch.ones(1, 3))).item() == 0.0  # (1e8 + 1) - 1e8 in float32, in this order


def test_ties_go_to_the_lower_id() -> None:
    routing = softmax_top_k(torch.zeros(3, 7), 4, normalize=True)
    assert routing.ids.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(routing.weights, torch.full((3, 4), 0.25))


def test_weights_follow_their_experts() -> None:
    routing = softmax_top_k(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), 2, normalize=False)
    assert routing.ids.tolist() == [[1, 3]]
    assert torch.allclose(routing.weights, torch.softmax(torch.tensor([0.0, 3.0, 1.0, 2.0]), 0)[[1, 3]])
