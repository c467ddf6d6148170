"""Which machine could hold what: the gateway on one, the experts shared as evenly as memory allows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from consilium.errors import ConfigError
from consilium.inspect.served import PROCESS

# Of a machine's memory, what is left to the system and to peaks.
RESERVE = 0.1


@dataclass(frozen=True, slots=True)
class Need:
    """What a deployment takes, in bytes."""

    gateway: int  # the dense weights, and keys and values
    expert: int  # one expert of every layer that routes
    experts: int  # E

    @property
    def total(self) -> int:
        """Of a gateway and one worker on one machine."""
        return self.gateway + self.expert * self.experts + 2 * PROCESS


@dataclass(frozen=True, slots=True)
class Share:
    """What one machine is to run."""

    memory: int
    gateway: bool
    experts: range  # of every layer that routes
    used: int  # bytes


def usable(memory: int) -> int:
    """What may be used of ``memory``."""
    return int(memory * (1 - RESERVE))


def suggest_split(need: Need, machines: Sequence[int]) -> list[Share]:
    """A share for each of ``machines``, given by their memory in bytes; the gateway goes where it costs least balance.

    Raises ConfigError that says how much is missing.
    """
    best: tuple[list[int], int] | None = None
    for place in range(len(machines)):
        counts = _spread(need, machines, place)
        if counts is not None and (best is None or max(counts) < max(best[0])):
            best = counts, place
    if best is None:
        raise ConfigError(_too_small(need, machines))
    counts, place = best
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return [
        Share(memory, index == place, range(start, start + count), _used(need, count, gateway=index == place))
        for index, (memory, start, count) in enumerate(zip(machines, starts, counts, strict=True))
    ]


def _spread(need: Need, machines: Sequence[int], place: int) -> list[int] | None:
    """How many experts each machine gets with the gateway at ``place``; None where they have not the room."""
    if usable(machines[place]) < need.gateway + PROCESS:
        return None
    rooms = [_room(need, memory, gateway=index == place) for index, memory in enumerate(machines)]
    if sum(rooms) < need.experts:
        return None
    counts = [0] * len(machines)
    for _ in range(need.experts):  # the next one goes to the machine that has fewest
        free = [index for index, room in enumerate(rooms) if counts[index] < room]
        counts[min(free, key=lambda index: counts[index])] += 1
    return counts


def _room(need: Need, memory: int, *, gateway: bool) -> int:
    left = usable(memory) - PROCESS - (need.gateway + PROCESS if gateway else 0)
    return max(0, left // need.expert)


def _used(need: Need, count: int, *, gateway: bool) -> int:
    worker = need.expert * count + PROCESS if count else 0
    return worker + (need.gateway + PROCESS if gateway else 0)


def _too_small(need: Need, machines: Sequence[int]) -> str:
    if max(map(usable, machines)) < need.gateway + PROCESS:
        least = (need.gateway + PROCESS) / (1 - RESERVE)
        return f"--machines: none of them has room for the gateway, which needs one of {least / 2**30:.1f} GiB"
    rooms = [
        sum(_room(need, memory, gateway=index == place) for index, memory in enumerate(machines))
        for place in range(len(machines))
        if usable(machines[place]) >= need.gateway + PROCESS
    ]
    missing = need.experts - max(rooms)
    return (
        f"--machines: they have room for {max(rooms)} of {need.experts} experts of every layer; "
        f"{missing * need.expert / (1 - RESERVE) / 2**30:.1f} GiB more are needed, or fewer bytes for each expert "
        "(--quantization int8 or int4)"
    )
