"""How a frame is cut: whole experts, all of them once, in their order, and about as many pairs as asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.framing import in_turn, split


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data(), st.integers(1, 40))
def test_every_expert_is_in_one_piece(made: list[int], data: st.DataObject, most: int) -> None:
    counts = np.array(made)
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, len(made) - 1), min_size=1))))
    parts = split(positions, counts, most)
    assert np.concatenate(parts).tolist() == positions.tolist()
    pairs = [int(counts[part].sum()) for part in parts]
    assert all(len(part) for part in parts)
    assert max(pairs) < most + counts.max() + 1
    if counts[positions].sum() <= most:
        assert len(parts) == 1
    assert len(parts) <= counts[positions].sum() // most + 1


def test_first_pieces_go_first() -> None:
    assert in_turn({"a": [1, 2, 3], "b": [4], "c": [5, 6]}) == [
        ("a", 1),
        ("b", 4),
        ("c", 5),
        ("a", 2),
        ("c", 6),
        ("a", 3),
    ]
    assert in_turn({}) == []
