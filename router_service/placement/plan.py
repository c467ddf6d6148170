"""A whole placement, layer by layer, from who is there, what is held now, and how much is asked of every expert.

Letters: L layers that route, E experts in each, W workers that take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from router_service.placement.homes import find_homes
from router_service.placement.improve import improve
from router_service.placement.layer import Bools, Floats, Ints, Layer
from router_service.placement.policy import Policy
from router_service.placement.repair import repair, strip, trim

# Every expert is taken to have at least this part of the mean load of its layer: what nobody asks for now may be
# asked for next, and without any load at all the experts are shared evenly.
PRIOR = 0.05

Expert = tuple[int, int]  # layer, expert
Holders = Mapping[Expert, tuple[str, ...]]  # names of workers, ascending


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What placement knows of a worker. A CPU and a GPU differ in their two times."""

    name: str
    capacity: int  # experts that it has memory for, of any layer
    row_seconds: float = 1e-5  # to compute one row of one expert
    read_seconds: float = 8e-5  # beside that, for every expert that a step asks it for: reading the weights
    host: str = ""  # no two workers of one host get the same expert; empty: not known, and no rule
    device: str = "cpu"
    leaving: bool = False  # holds experts as long as nobody else does, and gets none
    failed: frozenset[Expert] = frozenset()  # could not be loaded there


@dataclass(frozen=True, slots=True)
class Demand:
    """How much is asked of the experts."""

    layers: tuple[int, ...]  # [L] those that route, ascending
    rows: Floats  # [L, E] (token, expert) pairs in a second
    reads: Floats  # [L, E] steps in a second in which an expert is asked for at all
    variance: Floats | None = None  # [L, E] of ``rows``; none where they are known exactly

    def uncertainty(self) -> Floats:
        """The variance of ``rows`` [L, E]."""
        return np.zeros_like(self.rows) if self.variance is None else self.variance

    def cost(self, workers: Sequence[WorkerSpec], prior: float = PRIOR) -> Floats:
        """Seconds of work per second [L, E, W] if a worker had an expert alone."""
        rows, reads = (each + prior * each.mean(axis=1, keepdims=True) for each in (self.rows, self.reads))
        idle = ~((rows > 0).any(axis=1, keepdims=True))
        rows, reads = np.where(idle, 1.0, rows), np.where(idle, 1.0, reads)
        per_row = np.array([each.row_seconds for each in workers])
        per_read = np.array([each.read_seconds for each in workers])
        cost: Floats = rows[:, :, None] * per_row + reads[:, :, None] * per_read
        return cost


class Move(NamedTuple):
    """An expert that a worker must load, or may drop."""

    worker: str
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Who shall hold what, and what has to happen for it."""

    holders: Holders
    loads: tuple[Move, ...]
    drops: tuple[Move, ...]
    missing: tuple[Expert, ...] = ()  # nobody has room for these


def place(workers: Sequence[WorkerSpec], held: Holders, demand: Demand, policy: Policy) -> Plan:
    """The placement to strive for. Workers that are not in ``workers`` are gone, with what they held.

    Deterministic: the order of ``workers`` does not matter. Raises ValueError for two workers of one name.
    """
    present = sorted(workers, key=lambda each: each.name)
    if len({each.name for each in present}) != len(present):
        raise ValueError("two workers have the same name")
    staying = [each for each in present if not each.leaving]
    before = _held_matrix(held, demand, present)  # [L, E, all]
    stays = np.array([not each.leaving for each in present], bool)
    after = before.copy()
    if staying:
        after[:, :, stays] = _place(staying, before[:, :, stays], demand, policy)
    after &= stays | ~after[:, :, stays].any(axis=2, keepdims=True)  # who leaves keeps what nobody else can take
    return _describe(present, demand, before, after)


def levels(workers: Sequence[WorkerSpec], holders: Holders, demand: Demand) -> tuple[Floats, Floats]:
    """How busy each of ``workers`` is with each layer [L, W], and the mean [L] if all were equally busy.

    Experts with several holders are split as the gateways do it: so that the busiest ends lowest.
    """
    held, cost = _held_matrix(holders, demand, workers), demand.cost(workers, prior=0.0)
    found = [_held_layer(each, mine) for each, mine in zip(cost, held, strict=True)]
    return np.stack([layer.level for layer in found]), np.array([layer.mean for layer in found])


def _held_layer(cost: Floats, held: Bools) -> Layer:
    workers = cost.shape[1]
    return Layer(cost, held, held.sum(axis=0), np.eye(workers, dtype=bool), np.ones_like(held))


def _place(workers: Sequence[WorkerSpec], held: Bools, demand: Demand, policy: Policy) -> Bools:
    """Who shall hold what [L, E, W]; every one of ``workers`` stays."""
    capacity = np.array([each.capacity for each in workers])
    quota = _quotas(capacity, *held.shape[:2])  # [L, W]
    near, cost, able = _near(workers), demand.cost(workers), ~_failed_matrix(workers, demand)
    hosts = [each.host for each in workers]
    known = demand.rows > 0
    doubt = np.divide(np.sqrt(demand.uncertainty()), demand.rows, out=np.zeros_like(demand.rows), where=known) ** 2
    layers = [
        Layer(
            *(each, mine & may, room, near),
            homes=find_homes(each, hosts, room, policy.gate_groups, policy.replicas) & may,
            doubt=unsure,
            able=may,
        )
        for each, mine, room, unsure, may in zip(cost, held, quota, doubt, able, strict=True)
    ]
    for layer in layers:
        strip(layer, policy.replicas)
    taken = np.sum([layer.taken for layer in layers], axis=0)  # [W] experts of all layers
    # In the second round, beyond a worker's quota, comes what found no other place.
    for step, limits in ((_complete, quota), (_complete, np.full_like(quota, held.shape[1])), (improve, quota)):
        for layer, limit in zip(layers, limits, strict=True):
            others = taken - layer.taken
            layer.limit = np.minimum(np.maximum(limit, layer.taken), np.maximum(capacity - others, 0))
            step(layer, policy)
            taken = others + layer.taken
    return np.stack([layer.held for layer in layers])


def _complete(layer: Layer, policy: Policy) -> None:
    trim(layer)
    repair(layer, policy.replicas)


def _quotas(capacity: Ints, layers: int, experts: int) -> Ints:
    """Each worker's room shared out among the layers [L, W], so that no layer has two places less than another."""
    capped = np.minimum(capacity, layers * experts)
    quota = np.tile(capped // layers, (layers, 1))
    start = 0
    for worker, rest in enumerate(capped % layers):
        quota[(start + np.arange(rest)) % layers, worker] += 1
        start += int(rest)
    return quota


def _near(workers: Sequence[WorkerSpec]) -> Bools:
    """Pairs of workers [W, W] that must not hold the same expert: one worker, one labelled host."""
    hosts = np.array([each.host or f"\0{index}" for index, each in enumerate(workers)])
    near: Bools = hosts[:, None] == hosts
    return near


def _failed_matrix(workers: Sequence[WorkerSpec], demand: Demand) -> Bools:
    """[L, E, W] bool."""
    failed: dict[Expert, tuple[str, ...]] = {}
    for each in workers:
        for expert in each.failed:
            failed[expert] = (*failed.get(expert, ()), each.name)
    return _held_matrix(failed, demand, workers)


def _held_matrix(held: Holders, demand: Demand, workers: Sequence[WorkerSpec]) -> Bools:
    """[L, E, W] bool."""
    layers = {layer: index for index, layer in enumerate(demand.layers)}
    places = {each.name: index for index, each in enumerate(workers)}
    matrix = np.zeros((*demand.rows.shape, len(workers)), bool)
    for (layer, expert), names in held.items():
        for name in names:
            if name in places:
                matrix[layers[layer], expert, places[name]] = True
    return matrix


def _describe(workers: Sequence[WorkerSpec], demand: Demand, before: Bools, after: Bools) -> Plan:
    names, layers = [each.name for each in workers], demand.layers
    found = {(layer, expert): list[str]() for layer in layers for expert in range(after.shape[1])}
    for index, expert, worker in np.argwhere(after).tolist():
        found[layers[index], expert].append(names[worker])

    def moves(where: Bools) -> tuple[Move, ...]:
        return tuple(Move(names[w], layers[index], expert) for index, expert, w in np.argwhere(where).tolist())

    return Plan(
        {expert: tuple(holders) for expert, holders in found.items() if holders},
        loads=moves(after & ~before),
        drops=moves(before & ~after),
        missing=tuple(expert for expert, holders in found.items() if not holders),
    )
