"""What a gateway asks of whom while it moves from one placement to the next."""

from __future__ import annotations

from gateway.epochs import Epochs, PlacedWorker, RouterView


def view(epoch: int, **held: list[int]) -> RouterView:
    """So many experts of layer 0 on each worker."""
    return RouterView(
        epoch,
        {
            name: PlacedWorker("experts", {(0, each): bytes([each]) * 16 for each in experts})
            for name, experts in held.items()
        },
    )


def asked(epochs: Epochs, *connected: str) -> dict[str, list[int]]:
    return {name: sorted(each for _, each in experts) for name, experts in epochs.held(connected).items()}


def test_the_first_placement_is_used_as_workers_are_reached() -> None:
    epochs = Epochs()
    epochs.take(view(5, a=[0, 1], b=[2, 3]))
    assert asked(epochs, "a") == {"a": [0, 1]}
    assert epochs.reach(["a"]) is None
    assert epochs.reach(["a", "b"]) == 5
    assert epochs.reach(["a", "b"]) is None  # said once


def test_until_a_new_worker_is_reached_the_former_one_is_asked() -> None:
    epochs = Epochs()
    epochs.take(view(1, a=[0, 1, 2, 3]))
    epochs.reach(["a"])
    epochs.take(view(2, a=[0, 1], b=[2, 3]))
    assert asked(epochs, "a") == {"a": [0, 1, 2, 3]}
    assert epochs.reach(["a"]) is None
    assert asked(epochs, "a", "b") == {"a": [0, 1], "b": [2, 3]}
    assert epochs.reach(["a", "b"]) == 2


def test_a_former_worker_stays_connected_until_it_is_not_needed() -> None:
    epochs = Epochs()
    epochs.take(view(1, a=[0, 1]))
    epochs.reach(["a"])
    epochs.take(view(2, b=[0, 1]))
    epochs.take(view(3, b=[0], c=[1]))  # before b was reached
    assert epochs.workers.keys() == {"a", "b", "c"}
    assert asked(epochs, "a", "c") == {"a": [0], "c": [1]}
    assert epochs.reach(["a", "b", "c"]) == 3
    assert epochs.workers.keys() == {"b", "c"}


def test_a_worker_that_is_lost_later_is_not_replaced_by_one_that_may_have_dropped_its_experts() -> None:
    epochs = Epochs()
    epochs.take(view(1, a=[0]))
    epochs.reach(["a"])
    epochs.take(view(2, b=[0]))
    epochs.reach(["b"])
    assert asked(epochs, "a") == {}
