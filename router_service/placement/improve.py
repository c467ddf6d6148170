"""Moves that relieve the busiest worker of a layer, as long as they are worth what they cost.

Letters: E experts of the layer, W workers, C candidates among the busiest worker's experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router_service.placement.layer import Floats, Ints, Layer
from router_service.placement.policy import Policy

CANDIDATES = 8  # of the busiest worker's experts, and of the workers that may exchange one of theirs for it
BALANCED = 0.01  # of the mean: nothing is done about a busiest worker that has so little more
MOST_STEPS = 4  # times the workers
SURE = 3.0  # standard deviations that a gain must be above what chance alone would make of it
_PROGRESS = 1e-4  # of the busiest level; less is not worth a look
_ROUNDING = 1e-9


def improve(layer: Layer, policy: Policy) -> None:
    """Copy and exchange experts so that the busiest worker has less to do.

    A move costs ``move_cost`` of the mean level, shared by the W workers, which load at the same time. Steps are taken
    one by one, and of all beginnings of this sequence the one that earns most is kept; none if none earns its cost, or
    if all that it earns may be the chance of the sample: of W workers that are equally busy one seems busiest.
    """
    start = layer.level.max()
    if start <= (1 + policy.tolerance) * layer.mean:
        return
    loaded = layer.held.copy()
    price = policy.move_cost * layer.mean / len(layer.level)
    best, most = loaded, (SURE + np.sqrt(2 * np.log(len(layer.level)))) * layer.noise()
    for _ in range(MOST_STEPS * len(layer.level)):
        if layer.level.max() <= (1 + BALANCED) * layer.mean or not _step(layer, policy.replicas):
            break
        earned = start - layer.level.max() - price * int((layer.held & ~loaded).sum())
        if earned > most + _PROGRESS * start:
            best, most = layer.held.copy(), earned
    if (layer.held != best).any():
        layer.hold(best)


def _step(layer: Layer, replicas: int) -> bool:
    """Relieve the busiest worker by one copy or one exchange; whether that was possible."""
    for _ in range(2):
        busiest = int(np.argmax(layer.level))
        load = layer.share[:, busiest] * layer.cost[:, busiest]  # [E]
        largest = np.argsort(-load, kind="stable")[:CANDIDATES]
        candidates = largest[load[largest] > 0]
        if len(candidates) and (_copy(layer, busiest, candidates, replicas) or _exchange(layer, busiest, candidates)):
            return True
        before = layer.level.max()
        layer.settle()  # perhaps others can take a larger part of what they hold, too
        if before - layer.level.max() <= _PROGRESS * before:
            break
    return False


def _copy(layer: Layer, busiest: int, candidates: Ints, replicas: int) -> bool:
    """One more copy of one of ``candidates`` [C]; where there is no room, instead of one that is not needed."""
    spare = layer.held & (layer.copies > replicas)[:, None]  # [E, W]
    victims = np.where(spare, layer.share * layer.cost, np.inf).argmin(axis=0)  # [W]
    has_room = layer.room > 0
    open_to = (layer.crowd(candidates) == 0) & layer.homes[candidates] & (has_room | spare.any(axis=0))  # [C, W]
    peaks = np.where(open_to, _split_peaks(layer, busiest, candidates), np.inf)
    choice, target = divmod(int(np.argmin(peaks)), len(has_room))
    before = layer.level[busiest]
    if peaks[choice, target] >= before * (1 - _PROGRESS):
        return False
    expert, victim = int(candidates[choice]), None if has_room[target] else int(victims[target])
    if victim is not None:
        layer.drop(victim, target)
    layer.add(expert, target)
    # Other workers may be as busy as the busiest was; it is their turn next.
    if max(layer.level[busiest], layer.level[target]) < before * (1 - _PROGRESS) and layer.level.max() <= before * (
        1 + _ROUNDING
    ):
        return True
    layer.drop(expert, target)
    if victim is not None:
        layer.add(victim, target)
    return False


def _split_peaks(layer: Layer, busiest: int, candidates: Ints) -> Floats:
    """The busier level of both [C, W] if the busiest worker shared its part of a candidate with another worker."""
    part = layer.share[candidates, busiest][:, None]  # [C, 1]
    mine, theirs = layer.cost[candidates, busiest][:, None], layer.cost[candidates]  # [C, 1], [C, W]
    base = layer.level[busiest] - part * mine
    kept = np.clip((layer.level + part * theirs - base) / (mine + theirs), 0, part)  # [C, W]
    peaks: Floats = np.maximum(base + kept * mine, layer.level + (part - kept) * theirs)
    return peaks


def _exchange(layer: Layer, busiest: int, candidates: Ints) -> bool:
    """Exchange one of ``candidates`` [C] for an expert of another worker, where both then have less to do."""
    before = layer.level[busiest]
    peak, choice, other, target = np.inf, -1, -1, -1
    crowd = layer.crowd()  # [E, W]
    for worker in np.argsort(layer.level, kind="stable")[:CANDIDATES]:
        peaks = _exchange_peaks(layer, crowd, busiest, candidates, int(worker))
        place = int(np.argmin(peaks))
        if peaks.flat[place] < peak:
            peak, (choice, other), target = peaks.flat[place], divmod(place, len(crowd)), int(worker)
    if peak >= before * (1 - _PROGRESS):
        return False
    expert = int(candidates[choice])
    layer.exchange(expert, busiest, other, target)
    return True


def _exchange_peaks(layer: Layer, crowd: NDArray[np.float32], busiest: int, candidates: Ints, target: int) -> Floats:
    """The busier level of both [C, E] if a candidate went to ``target`` and one of its experts came instead."""
    share, cost, near = layer.share, layer.cost, int(layer.near[busiest, target])
    comes = layer.held[:, target] & (crowd[:, busiest] == near) & layer.homes[:, busiest]  # [E] without its old copy
    goes = (crowd[candidates, target] == near) & layer.homes[candidates, target]  # [C]
    part, parts = share[candidates, busiest], share[:, target]  # [C], [E]
    here = layer.level[busiest] - (part * cost[candidates, busiest])[:, None] + parts * cost[:, busiest]
    there = layer.level[target] + (part * cost[candidates, target])[:, None] - parts * cost[:, target]
    return np.where(goes[:, None] & comes, np.maximum(here, there), np.inf)
