"""Who holds what, between the messages that say so and the sets that placement counts with. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from protos.expert.v1 import expert_pb2
from protos.router.v1 import router_pb2
from router_service.placement import Demand, WorkerSpec, levels

Expert = tuple[int, int]  # layer, expert
Held = Mapping[str, frozenset[Expert]]  # by worker
Records = Mapping[str, router_pb2.WorkerRecord]  # by worker


def pairs_of(sets: Iterable[expert_pb2.LayerExperts | router_pb2.ExpertSet]) -> frozenset[Expert]:
    """The experts that messages name."""
    return frozenset((each.layer, expert) for each in sets for expert in each.experts)


def expert_sets(pairs: Iterable[Expert]) -> list[router_pb2.ExpertSet]:
    """One message for each layer, ascending."""
    layers: dict[int, list[int]] = {}
    for layer, expert in sorted(pairs):
        layers.setdefault(layer, []).append(expert)
    return [router_pb2.ExpertSet(layer=layer, experts=experts) for layer, experts in layers.items()]


def hashes_of(sets: Iterable[expert_pb2.LayerExperts]) -> dict[Expert, bytes]:
    """The content hash of every expert that is held."""
    return {
        (each.layer, expert): digest for each in sets for expert, digest in zip(each.experts, each.hashes, strict=True)
    }


def held_by(records: Records) -> dict[str, frozenset[Expert]]:
    """What each worker says it holds."""
    return {name: pairs_of(record.held) for name, record in records.items()}


def holders_of(held: Held) -> dict[Expert, tuple[str, ...]]:
    """The same by expert; names ascending."""
    holders: dict[Expert, list[str]] = {}
    for name in sorted(held):
        for expert in held[name]:
            holders.setdefault(expert, []).append(name)
    return {expert: tuple(names) for expert, names in holders.items()}


def by_worker(holders: Mapping[Expert, Iterable[str]]) -> dict[str, set[Expert]]:
    """What each worker holds, from who holds each expert."""
    held: dict[str, set[Expert]] = {}
    for expert, names in holders.items():
        for name in names:
            held.setdefault(name, set()).add(expert)
    return held


def spec_of(name: str, record: router_pb2.WorkerRecord) -> WorkerSpec:
    """A worker as placement sees it."""
    worker = record.worker
    return WorkerSpec(
        name,
        worker.capacity,
        max(worker.row_ns, 1) / 1e9,
        max(worker.read_ns, 1) / 1e9,
        worker.host,
        worker.description.device,
        record.draining,
        pairs_of(record.failed),
    )


def placed_workers(records: Records, held: Mapping[str, Iterable[Expert]]) -> list[router_pb2.PlacedWorker]:
    """Every worker with its experts in ``held``, in order of their ids."""
    return [
        router_pb2.PlacedWorker(
            worker_id=name,
            address=record.worker.address,
            group=record.worker.description.group,
            experts=expert_sets(held.get(name, ())),
            row_ns=record.worker.row_ns,
            read_ns=record.worker.read_ns,
        )
        for name, record in sorted(records.items())
    ]


def balance_of(state: router_pb2.RouterState, records: Records, demand: Demand) -> float:
    """Busiest over mean in the worst layer; 0 while nothing is known of the load, or nobody is there."""
    specs = [spec_of(name, record) for name, record in sorted(records.items())]
    if not specs or not demand.rows.any():
        return 0.0
    holders: dict[Expert, tuple[str, ...]] = {}
    for each in state.placement.workers:
        for expert in pairs_of(each.experts):
            holders[expert] = (*holders.get(expert, ()), each.worker_id)
    busy, mean = levels(specs, holders, demand)
    return float((busy.max(axis=1) / np.maximum(mean, 1e-30)).max())


def layer_hashes(records: Records, layers: Sequence[int], experts: int) -> list[router_pb2.LayerHashes]:
    """The content hash of every expert that anybody holds."""
    known: dict[Expert, bytes] = {}
    for record in records.values():
        known.update(hashes_of(record.held))
    nobody = bytes(16)
    return [
        router_pb2.LayerHashes(
            layer=layer, hashes=b"".join(known.get((layer, expert), nobody) for expert in range(experts))
        )
        for layer in layers
    ]
