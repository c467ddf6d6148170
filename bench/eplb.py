"""EPLB (DeepSeek's load balancer), written from its description, to compare placements with.

One copy of each expert first; every spare slot goes to the expert with the largest load per copy; copies are packed by
descending load into the lightest bin with room. The hierarchical kind packs groups onto nodes first and does the rest
within each node. All workers are alike, nobody is dead, nothing moves for free or at a price. Letters: E experts, S
slots of all workers together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def balance(load: Floats, workers: int, slots: int, groups: int = 1, nodes: int = 1) -> list[list[int]]:
    """The experts in the ``slots`` of each worker, from the ``load`` [E] of each expert.

    Raises ValueError where the numbers do not divide.
    """
    if slots % workers or workers % nodes or len(load) % groups or slots < len(load):
        raise ValueError("slots must be a multiple of workers, workers one of nodes, experts one of groups")
    if groups % nodes:  # groups cannot be kept together
        groups, nodes = 1, 1
    size = len(load) // groups
    of_groups = load.reshape(groups, size).sum(axis=1)
    placed: list[list[int]] = []
    for members in pack(of_groups, nodes):
        experts = np.concatenate([np.arange(size) + group * size for group in sorted(members)])
        copies = replicate(load[experts], slots // nodes)
        shares = load[experts] / np.bincount(copies, minlength=len(experts))
        packed = pack(shares[copies], workers // nodes)
        placed += [[int(experts[copies[place]]) for place in each] for each in packed]
    return placed


def replicate(load: Floats, slots: int) -> NDArray[np.int64]:
    """Which expert each of ``slots`` holds [S]."""
    copies = list(range(len(load)))
    counts = np.ones(len(load))
    for _ in range(slots - len(load)):
        expert = int(np.argmax(load / counts))
        copies.append(expert)
        counts[expert] += 1
    return np.array(copies)


def pack(load: Floats, bins: int) -> list[list[int]]:
    """As many items into each of ``bins``: the heaviest first, each into the lightest bin with room."""
    room = len(load) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    weight = np.zeros(bins)
    for item in np.argsort(-load, kind="stable"):
        open_bins = np.array([len(each) < room for each in packed])
        lightest = int(np.argmin(np.where(open_bins, weight, np.inf)))
        packed[lightest].append(int(item))
        weight[lightest] += load[item]
    return packed
