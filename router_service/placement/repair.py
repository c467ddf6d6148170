"""Gives every expert the copies it must have. What is held already stays where it is."""

from __future__ import annotations

import numpy as np

from router_service.placement.layer import Bools, Floats, Ints, Layer

LARGE = 0.3  # of the mean level: smaller loads are packed well in one piece


def repair(layer: Layer, replicas: int) -> None:
    """Add copies until every expert has ``replicas``, as far as there is room: if it is short, first copies first.

    What has to be loaded anyway gets as many copies as it needs to be packed well. Large ones go first, each to the
    worker that will be least busy with it (Graham's longest processing time, with workers of unequal speed).
    """
    size = layer.sizes()
    lacking = np.flatnonzero(layer.copies < replicas)
    wanted = _wanted(layer, lacking, size, replicas)
    order = lacking[np.argsort(-size[lacking] / wanted[lacking], kind="stable")]
    enough = (wanted - layer.copies)[lacking].sum() <= layer.room.clip(0).sum()
    for copies in [wanted] if enough else (np.full_like(wanted, each + 1) for each in range(replicas)):
        for expert in order:
            while layer.copies[expert] < copies[expert] and _give(layer, int(expert), replicas):
                pass
    layer.settle()


def _wanted(layer: Layer, lacking: Ints, size: Floats, replicas: int) -> Ints:
    """Copies of each expert [E]: spare room goes where the load per copy is largest, as long as that is large."""
    wanted = np.maximum(layer.copies, replicas)
    spare = int(layer.room.clip(0).sum() - (wanted - layer.copies)[lacking].sum())
    most = len(layer.level)
    piece = np.zeros(len(size))  # [E] load per copy of what may have one more
    piece[lacking] = size[lacking] / wanted[lacking]
    for _ in range(max(0, spare) if len(lacking) else 0):
        expert = int(piece.argmax())
        if piece[expert] <= LARGE * layer.mean:
            break
        wanted[expert] += 1
        piece[expert] = size[expert] / wanted[expert] if wanted[expert] < most else 0.0
    return wanted


def strip(layer: Layer, replicas: int) -> None:
    """Take copies that are not needed from workers that hold more of the layer than their part."""
    for worker in np.flatnonzero(layer.room < 0):
        spare = np.flatnonzero(layer.held[:, worker] & (layer.copies > replicas))
        for expert in spare[np.argsort(layer.cost[spare, worker], kind="stable")][: -int(layer.room[worker])]:
            layer.drop(int(expert), int(worker))


def trim(layer: Layer) -> None:
    """Take from workers that hold more than they have room for: what others hold too goes first, then what is small."""
    for worker in np.flatnonzero(layer.room < 0):
        while layer.room[worker] < 0:
            mine = np.flatnonzero(layer.held[:, worker])
            last = np.lexsort((layer.cost[mine, worker], -layer.copies[mine]))[0]
            layer.drop(int(mine[last]), int(worker))


def _give(layer: Layer, expert: int, replicas: int) -> bool:
    """One more copy, wherever it may be; whether there is a place."""
    if _spread(layer, expert):
        return True
    free = layer.room > 0
    elsewhere = free & layer.able[expert]
    if not layer.copies[expert] and elsewhere.any():  # its home is full: better elsewhere than nowhere
        layer.add(expert, _lowest(layer, expert, elsewhere))
        return True
    return _evict(layer, expert, replicas) or _displace(layer, expert, free)


def _evict(layer: Layer, expert: int, replicas: int) -> bool:
    """One more copy instead of another expert's that is not needed; whether there is one."""
    least = replicas if layer.copies[expert] else 1  # a first copy is worth more than a second one
    spare = layer.held & (layer.copies > least)[:, None]  # [E, W]
    places = layer.allowed(expert) & spare.any(axis=0) & (layer.room >= 0)
    if not places.any():
        return False
    place = _lowest(layer, expert, places)
    others = np.flatnonzero(spare[:, place])
    victim = others[np.argmin((layer.share * layer.cost)[others, place])]
    layer.drop(int(victim), place)
    layer.add(expert, place)
    return True


def _spread(layer: Layer, expert: int) -> bool:
    """One more copy on a worker that has room; whether there is one."""
    places = layer.allowed(expert) & (layer.room > 0)
    if not places.any():
        return False
    # What a copy will get depends on the other holders; as if it got all, the order of workers is right enough.
    layer.add(expert, _lowest(layer, expert, places))
    return True


def _lowest(layer: Layer, expert: int, among: Bools) -> int:
    return int(np.where(among, layer.level + layer.cost[expert], np.inf).argmin())


def _displace(layer: Layer, expert: int, free: Bools) -> bool:
    """Where only workers that must not have the expert are free: another expert goes to one of them and makes room."""
    if not free.any():
        return False
    crowd = layer.crowd()  # [E, W]
    for full in np.flatnonzero(layer.allowed(expert)):
        others = np.flatnonzero(layer.held[:, full])
        movable = (crowd[others] == layer.near[full]) & layer.homes[others] & free  # once their old copy is gone
        if movable.any():
            other, place = np.argwhere(movable)[0]
            layer.drop(int(others[other]), int(full))
            layer.add(int(others[other]), int(place))
            layer.add(expert, int(full))
            return True
    return False
