"""The experts a worker holds, read from the checkpoint and ready to compute with."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from itertools import product

from consilium.errors import StalePlacement
from consilium.experts import ExpertWeights
from expert_service.expert_memory import Held, LimitedMemory
from expert_service.paged_expert import PagedExpert
from expert_service.sources import HeldSource

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0


class ExpertStore:
    """Weights and content hashes by layer and expert. One thread changes it while another one reads."""

    memory: LimitedMemory | None = None  # is told of experts that are dropped

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers: dict[int, dict[int, Held]] = {layer: {} for layer in layers}
        self.hashes: dict[int, dict[int, bytes]] = {layer: {} for layer in layers}
        self.nbytes = 0
        self.changes: dict[int, int] = {}  # by layer: how often what is held has changed

    def add(self, layer: int, expert: int, weights: Held, content_hash: bytes | None = None) -> None:
        """Hold one more expert; its ``content_hash`` is computed unless it is known."""
        digest = content_hash or weights.content_hash()
        self._layers.setdefault(layer, {})[expert] = weights
        self.hashes.setdefault(layer, {})[expert] = digest
        self.nbytes += weights.nbytes()
        self.changes[layer] = self.changes.get(layer, 0) + 1

    def drop(self, layer: int, expert: int) -> None:
        """Hold one expert less; what is computed with it now goes on."""
        del self.hashes[layer][expert]
        weights = self._layers[layer].pop(expert)
        self.nbytes -= weights.nbytes()
        self.changes[layer] = self.changes.get(layer, 0) + 1
        if self.memory is not None and isinstance(weights, PagedExpert):
            self.memory.forget(weights)

    def held(self, layer: int) -> dict[int, ExpertWeights]:
        """All of one layer that are whole in memory, by expert; a copy."""
        held = self._layers.get(layer, {})
        return {expert: weights for expert, weights in held.items() if isinstance(weights, ExpertWeights)}

    def find(self, layer: int, experts: Sequence[int]) -> list[Held]:
        """The weights of ``experts`` of one layer. Raises StalePlacement that names what is not held."""
        held = self._layers.get(layer)
        if held is None:
            raise StalePlacement(f"layer {layer} is not on this worker, which holds layers {_brief(self._layers)}")
        found = [weights for expert in experts if (weights := held.get(expert)) is not None]
        if len(found) < len(experts):
            missing = [expert for expert in experts if expert not in held]
            raise StalePlacement(
                f"experts {_brief(missing)} of layer {layer} are not on this worker, which holds {_brief(list(held))}"
            )
        return found


def load_store(source: HeldSource, layers: Sequence[int], experts: Sequence[int]) -> ExpertStore:
    """Read and prepare ``experts`` of every one of ``layers``, logging progress.

    Raises CheckpointError that names the file and the tensor when one is missing, of a wrong shape, or not finite.
    """
    store = ExpertStore(layers)
    total, next_line = len(layers) * len(experts), time.monotonic() + PROGRESS_SECONDS
    for done, (layer, expert) in enumerate(product(layers, experts)):
        store.add(layer, expert, *source.load(layer, expert))
        if time.monotonic() > next_line:
            logger.info("loaded %d of %d experts", done + 1, total)
            next_line = time.monotonic() + PROGRESS_SECONDS
    logger.info("holding %d experts in %d layers, %.1f MiB", total, len(layers), store.nbytes / 2**20)
    return store


def _brief(numbers: Collection[int]) -> str:
    first = sorted(numbers)[:16]
    return ", ".join(map(str, first)) + (", …" if len(numbers) > len(first) else "")
