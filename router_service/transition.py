"""From the placement there is to the one that is wanted, without a moment in which an expert has no holder. Pure.

Workers load first; gateways are told once everything that shall hold an expert holds it; and once all gateways say that
they have followed, the others drop it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from protos.router.v1 import router_pb2
from router_service.holdings import Expert, Records, by_worker, held_by, holders_of, layer_hashes, placed_workers
from router_service.placement.plan import Holders

# A copy that gateways were told not to use is kept for so long at least: one that is just starting says only then which
# placement it uses.
DROP_SECONDS = 1.0


def usable(target: Holders, records: Records) -> dict[Expert, tuple[str, ...]]:
    """Who gateways may ask for each expert: those that shall hold it, as soon as all of them do; else all that do."""
    found: dict[Expert, tuple[str, ...]] = {}
    for expert, names in holders_of(held_by(records)).items():
        aimed = target.get(expert, ())
        found[expert] = aimed if aimed and set(aimed) <= set(names) else names
    return found


class Transition:
    """What workers and gateways are told, tick by tick."""

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._layers, self._experts = layers, experts
        # Copies that gateways were told not to use any more: when, and with which epoch.
        self._left: dict[tuple[str, Expert], tuple[float, int]] = {}

    def step(
        self,
        before: router_pb2.RouterState,
        records: Records,
        target: Holders,
        now: float,
        used: Iterable[int] = (),
    ) -> router_pb2.RouterState:
        """The next state; its epoch is one more than that of ``before`` where anything differs.

        ``used`` are the epochs that gateways use: nothing is dropped that one of those names.
        """
        published = by_worker(usable(target, records))
        self._note_left(before, published, now, min(used, default=None))
        wanted = {name: set(experts) for name, experts in by_worker(target).items()}
        for name, experts in published.items():
            wanted.setdefault(name, set()).update(experts)
        for name, expert in self._left:
            wanted.setdefault(name, set()).add(expert)
        state = router_pb2.RouterState(
            placement=router_pb2.Placement(
                epoch=before.placement.epoch,
                workers=placed_workers(records, published),
                hashes=layer_hashes(records, self._layers, self._experts),
            ),
            wanted=placed_workers(records, wanted),
        )
        if state != before:
            state.placement.epoch += 1
        return state

    def _note_left(
        self, before: router_pb2.RouterState, published: Mapping[str, set[Expert]], now: float, oldest: int | None
    ) -> None:
        epoch = before.placement.epoch + 1  # that of the state which is being made, where anything is left at all
        for worker in before.placement.workers:
            for each in worker.experts:
                for expert in each.experts:
                    if (each.layer, expert) not in published.get(worker.worker_id, ()):
                        self._left.setdefault((worker.worker_id, (each.layer, expert)), (now, epoch))
        self._left = {
            copy: (since, left)
            for copy, (since, left) in self._left.items()
            if copy[1] not in published.get(copy[0], ())
            and (now - since < DROP_SECONDS or (oldest is not None and oldest < left))
        }
