"""Which worker holds which experts, and which of them computes what. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilium.kernels import routing as kernel
from consilium.model_config import ModelConfig
from gateway.fleet import COSTS, Fleet


class ExpertIdentity(NamedTuple):
    """What decides the bits of an expert's outputs, beside its inputs."""

    weights: bytes  # content hash
    numerics_class: str


class KnownExperts:
    """What each expert was computed with when it was last seen."""

    def __init__(self) -> None:
        self._identities: dict[tuple[int, int], ExpertIdentity | None] = {}  # None where its holders differ

    def differ(self, placement: Placement, identities: Mapping[tuple[int, int], ExpertIdentity]) -> bool:
        """Whether an expert that was known computes otherwise now; one that is gone or comes back the same does not."""
        now = {expert: identities.get(expert) for expert in placement.holders}
        different = any(self._identities.get(expert, identity) != identity for expert, identity in now.items())
        self._identities.update(now)
        return different


class LayerHolders(NamedTuple):
    """Who holds the experts of one layer, as kernels read it."""

    addresses: list[str]  # of all workers, ascending
    starts: NDArray[np.int64]  # [E + 1] where the holders of each expert begin
    workers: NDArray[np.int64]  # places in ``addresses``
    owners: NDArray[np.int64]  # [E] the place of each expert's only holder; -1 where there is none, or several
    replicated: bool  # whether an expert has several holders


@dataclass(frozen=True, slots=True)
class Placement:
    """The addresses of the workers that hold each expert; one immutable view, replaced as a whole."""

    holders: Mapping[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)  # (layer, expert) to addresses
    addresses: list[str] = field(init=False, compare=False)  # of all workers, ascending
    layers: dict[int, LayerHolders] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        addresses = sorted({each for many in self.holders.values() for each in many})
        index = {address: place for place, address in enumerate(addresses)}
        held: dict[int, dict[int, list[int]]] = {}
        for (layer, expert), many in self.holders.items():
            held.setdefault(layer, {})[expert] = [index[each] for each in many]
        object.__setattr__(self, "addresses", addresses)
        object.__setattr__(self, "layers", {layer: _layer_holders(addresses, each) for layer, each in held.items()})

    def of_layer(self, layer: int) -> LayerHolders:
        """The same for one layer; nobody holds anything of a layer that is not known."""
        return self.layers.get(layer) or _layer_holders(self.addresses, {})

    def without(self, addresses: Collection[str]) -> Placement:
        """The same without some workers."""
        left = {expert: tuple(each for each in many if each not in addresses) for expert, many in self.holders.items()}
        return Placement({expert: many for expert, many in left.items() if many})

    def missing(self, config: ModelConfig) -> list[tuple[int, int]]:
        """The experts (layer, expert) that nobody holds, ascending."""
        wanted = ((layer, expert) for layer in config.expert_layers() for expert in range(config.num_experts))
        return [each for each in wanted if not self.holders.get(each)]


def build_placement(held: Mapping[str, Iterable[tuple[int, int]]]) -> Placement:
    """The placement of workers (by address) that hold these experts."""
    holders: dict[tuple[int, int], list[str]] = {}
    for address in sorted(held):
        for expert in held[address]:
            holders.setdefault(expert, []).append(address)
    return Placement({expert: tuple(addresses) for expert, addresses in holders.items()})


def describe_missing(missing: Sequence[tuple[int, int]]) -> str:
    """One short sentence naming experts that nobody holds."""
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer in sorted({layer for layer, _ in missing}):
        experts = tuple(expert for each, expert in missing if each == layer)
        layers.setdefault(experts, []).append(layer)
    parts = [f"experts {_ranges(experts)} of layers {_ranges(where)}" for experts, where in layers.items()]
    more = f" and {len(parts) - 3} more such groups" if len(parts) > 3 else ""
    return f"no worker holds {', '.join(parts[:3])}{more}"


def _layer_holders(addresses: list[str], held: Mapping[int, Sequence[int]]) -> LayerHolders:
    """``held`` has the places of each expert's holders."""
    places = [held.get(expert, ()) for expert in range(max(held, default=-1) + 1)]
    starts = np.cumsum([0, *map(len, places)], dtype=np.int64)
    workers = np.array([each for mine in places for each in mine], np.int64)
    owners = np.array([each[0] if len(each) == 1 else -1 for each in places], np.int64)
    return LayerHolders(addresses, starts, workers, owners, any(len(each) > 1 for each in places))


Plan = dict[str, NDArray[np.int64]]  # the positions of each address, ascending


def assign_owned(holders: LayerHolders, experts: NDArray[np.int64]) -> Plan | None:
    """The plan where each of ``experts`` [M] has one holder; None where one has none, or several."""
    positions, starts = kernel.owned(holders.owners, experts, len(holders.addresses))
    return _parts(holders.addresses, positions, starts.tolist()) if len(positions) else None


def assign(
    holders: LayerHolders,
    experts: NDArray[np.int64],
    counts: NDArray[np.int64],
    fleet: Fleet,
    turn: int,
    excluded: Collection[str] = (),
) -> tuple[Plan, NDArray[np.int64]]:
    """Give each of ``experts`` [M] with ``counts`` [M] rows to one of its holders (consilium.kernels.routing.assign).

    ``fleet`` has the same addresses as ``holders``; ``excluded`` ones get nothing. Returns the positions (in
    ``experts``) of each address, whoever has most to do first, and those that nobody can take.
    """
    standing = fleet.standing
    if excluded:
        standing = standing.copy()
        standing[[fleet.index[each] for each in excluded if each in fleet.index]] = 2
    loads = standing, fleet.load, fleet.unit, COSTS
    positions, begins = kernel.assign(holders.starts, holders.workers, experts, counts, *loads, turn)
    starts = begins.tolist()
    return _parts(holders.addresses, positions, starts[:-1]), positions[starts[-2] :]


def _parts(addresses: list[str], positions: NDArray[np.int64], starts: list[int]) -> Plan:
    """What each of them is to do, whoever has most first."""
    parts = zip(addresses, pairwise(starts), strict=True)
    plan = {address: positions[start:stop] for address, (start, stop) in parts if start < stop}
    return dict(sorted(plan.items(), key=lambda part: -len(part[1])))


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if number is not None:
            start = previous = number
    return ",".join(parts)
