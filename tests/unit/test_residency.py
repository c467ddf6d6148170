"""Who stays in memory: what is asked for most, of late."""

from __future__ import annotations

import random

from expert_service.residency import Residency


def ask(residency: Residency[str], *keys: str) -> list[str]:
    """Ask for ``keys`` and take in what is missing; what made way."""
    residency.touch(keys)
    gone = []
    for key in keys:
        if key not in residency:
            taken = residency.take(key)
            assert taken is not None
            gone += [] if taken[1] is None else [taken[1]]
    return gone


def test_what_was_asked_for_once_leaves_before_what_is_hot() -> None:
    residency = Residency[str](3, half_life=100)
    for _ in range(5):
        assert ask(residency, "hot", "warm") == []
    assert ask(residency, "hot") == []
    passing = [f"once {number}" for number in range(20)]
    gone = [each for key in passing for each in ask(residency, key)]
    assert gone == passing[:-1]
    assert {"hot", "warm"} < {key for key in ("hot", "warm", passing[-1]) if key in residency}


def test_what_was_hot_long_ago_leaves() -> None:
    residency = Residency[str](2, half_life=2)
    for _ in range(10):
        ask(residency, "then")
    ask(residency, "now")
    for _ in range(20):
        ask(residency, "now")
    assert ask(residency, "new") == ["then"]


def test_what_is_pinned_stays_and_what_is_forgotten_leaves_first() -> None:
    residency = Residency[str](2, half_life=10)
    ask(residency, "a", "a", "b")
    residency.pin("b")
    residency.pin("b")
    residency.unpin("b")
    residency.touch(["c", "c", "d"])
    assert residency.take("c") == (0, "a")
    residency.pin("c")
    assert residency.take("d") is None
    residency.unpin("c")
    residency.forget("b")
    residency.unpin("b")
    assert residency.take("d") == (1, "b")
    residency.give_up("d")
    assert "d" not in residency
    assert residency.take("e") == (1, None)
    assert len(residency) == 2


def test_it_finds_more_than_least_recently_used_where_layers_take_turns() -> None:
    """A third of 8 experts in 12 layers fit, and a step asks for two of each layer, some much more often."""
    random.seed(0)
    layers, slots = 12, 32
    residency, recent = Residency[str](slots, half_life=32 * layers), list[str]()
    hits = least_recent_hits = 0
    for _ in range(200):
        for layer in range(layers):
            keys = list({f"{layer} {min(int(random.expovariate(0.7)), 7)}" for _ in range(2)})
            hits += sum(key in residency for key in keys)
            least_recent_hits += sum(key in recent[-slots:] for key in keys)
            recent = [key for key in recent if key not in keys] + keys
            ask(residency, *keys)
    assert hits > 1.1 * least_recent_hits
