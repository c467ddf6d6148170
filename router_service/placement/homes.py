"""Where the groups of a node-limited gate live: each token asks a few groups, so each group stays on few hosts.

Letters: E experts of a layer in G groups of neighbours, W workers, H hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router_service.placement.layer import Bools, Floats, Ints


def find_homes(cost: Floats, hosts: Sequence[str], quota: Ints, groups: int, replicas: int) -> Bools:
    """Where each expert may go [E, W]: anywhere, where the gate has one group or hosts are not labelled.

    Groups are packed by descending load, each onto ``replicas`` hosts: to those that will be least busy with it and
    have room for all of it, or, where none has, to those with most room.
    """
    experts, workers = cost.shape
    names = sorted(set(hosts))
    if groups <= 1 or len(names) < 2 or "" in names:
        return np.ones((experts, workers), bool)
    member = np.array([[host == name for host in hosts] for name in names])  # [H, W]
    load = cost.reshape(groups, experts // groups, workers).sum(axis=1)  # [G, W] if one worker had the group alone
    speed = member @ (1 / load.T)  # [H, G] groups in a second of work of the whole host
    room = member @ quota  # [H]
    level = np.zeros(len(names))
    homes = np.zeros((groups, workers), bool)
    size = experts // groups
    for group in np.argsort(-load.max(axis=1), kind="stable"):
        for _ in range(min(replicas, len(names))):
            free = ~(homes[group] & member).any(axis=1)  # [H] without a copy
            fits = free & (room >= size)
            busy = level + 1 / speed[:, group] / replicas
            home = int(np.argmin(np.where(fits, busy, np.inf) if fits.any() else np.where(free, -room, np.inf)))
            homes[group] |= member[home]
            room[home] -= size
            level[home] = busy[home]
    return np.repeat(homes, size, axis=0)
