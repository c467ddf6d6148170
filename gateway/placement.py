"""Which worker holds which experts, and which of them computes what. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consilium.model_config import ModelConfig

# Reading an expert's weights costs a worker about as much as computing this many rows of it.
EXPERT_COST = 8


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


@dataclass(frozen=True, slots=True)
class Placement:
    """The addresses of the workers that hold each expert; one immutable view, replaced as a whole."""

    holders: Mapping[tuple[int, int], tuple[str, ...]] = field(default_factory=dict)  # (layer, expert) to addresses
    _sole: dict[int, tuple[list[str], NDArray[np.int64]]] = field(default_factory=dict, init=False, compare=False)

    def sole_holders(self, layer: int) -> tuple[list[str], NDArray[np.int64]]:
        """Addresses, and for every expert [E] of the layer which of them alone holds it; -1 for none or several."""
        if layer not in self._sole:
            held = {expert: addresses for (each, expert), addresses in self.holders.items() if each == layer}
            addresses = sorted({each for many in held.values() for each in many})
            owners = np.full(max(held, default=-1) + 1, -1, np.int64)
            for expert, mine in held.items():
                if len(mine) == 1:
                    owners[expert] = addresses.index(mine[0])
            self._sole[layer] = addresses, owners
        return self._sole[layer]

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


def assign(
    pairs: Mapping[int, int], holders: Mapping[int, tuple[str, ...]], turn: int
) -> tuple[dict[str, list[int]], list[int]]:
    """Give each expert to one of its holders, so that the busiest worker has little more than the others.

    ``pairs`` says how many rows each expert has, ``holders`` who may take it. Large experts are placed first, each
    with the worker that has least so far (Graham's longest processing time); ``turn`` rotates ties, so that replicas
    share the load of many small steps. Returns the experts of each address, ascending, and those nobody can take.
    """
    plan: dict[str, list[int]] = {}
    cost: dict[str, int] = {}
    orphans: list[int] = []
    for expert in sorted(pairs, key=lambda each: (len(holders.get(each, ())) > 1, -pairs[each], each)):
        candidates = holders.get(expert, ())
        if not candidates:
            orphans.append(expert)
            continue
        shift = turn % len(candidates)
        address = min(candidates[shift:] + candidates[:shift], key=lambda each: cost.get(each, 0))
        plan.setdefault(address, []).append(expert)
        cost[address] = cost.get(address, 0) + EXPERT_COST + pairs[expert]
    return {address: sorted(experts) for address, experts in plan.items()}, sorted(orphans)


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
