"""What a worker holds, as it changes while it serves: loaded and dropped one expert at a time, and described."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from expert_service.sources import HeldSource
from expert_service.store import ExpertStore
from protos.expert.v1 import expert_pb2
from protos.router.v1 import router_pb2

Expert = tuple[int, int]  # layer, expert


class Holdings:
    """A store that is filled from one source. Experts are loaded on one thread at a time."""

    def __init__(self, source: HeldSource, store: ExpertStore, description: expert_pb2.DescribeResponse) -> None:
        """``description`` is what Describe answers; :meth:`describe` keeps it true."""
        self._source, self._store, self._description = source, store, description
        self.version = 0  # rises with every change

    def held(self) -> frozenset[Expert]:
        """What can be computed now."""
        return frozenset((layer, expert) for layer, hashes in self._store.hashes.items() for expert in list(hashes))

    def load(self, expert: Expert) -> None:
        """Hold one more. Raises as its source does, and then holds it not."""
        self._store.add(*expert, *self._source.load(*expert))
        self.version += 1

    def drop(self, expert: Expert) -> None:
        """Hold one less."""
        self._store.drop(*expert)
        self.version += 1

    def describe(self) -> list[expert_pb2.LayerExperts]:
        """Everything held, with hashes; Describe answers the same from now on."""
        layers = describe_store(self._store)
        del self._description.layers[:]
        self._description.layers.extend(layers)
        return layers


def expert_sets(experts: Iterable[Expert]) -> list[router_pb2.ExpertSet]:
    """One message for each layer, ascending."""
    return [
        router_pb2.ExpertSet(layer=layer, experts=[expert for _, expert in group])
        for layer, group in groupby(sorted(experts), key=lambda each: each[0])
    ]


def describe_store(store: ExpertStore) -> list[expert_pb2.LayerExperts]:
    """The layers of which anything is held, ascending, with the hash of every expert."""
    found = []
    for layer in sorted(store.hashes):
        hashes = dict(sorted(store.hashes[layer].copy().items()))
        if hashes:
            found.append(expert_pb2.LayerExperts(layer=layer, experts=hashes.keys(), hashes=hashes.values()))
    return found
