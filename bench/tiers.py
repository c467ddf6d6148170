"""Which experts to keep in memory: how many of those that are asked for are found, by what decides who makes way.

`python -m bench.tiers`. What the gates of a model ask for over a text is recorded and replayed token by token, layer by
layer, against memory for a share of the experts; the first quarter of the text does not count. LRFU is the worker's own
(expert_service.residency) at several half-lives, in tokens; LRU is least recently used; "foresight" evicts what is not
asked for for longest (Belady 1966), which nobody can know. A share below that of the experts that a token asks for is
the hardest: least recently used then finds nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.expert_record import record
from bench.machine import describe
from bench.report import write
from consilium.checkpoint import Checkpoint
from consilium.models import resolve_model
from consilium.quantize.text import calibration_text, encode_text
from expert_service.residency import Residency

Key = tuple[int, int]  # layer, expert
Memory = Callable[[list[Key]], int]  # asked for some experts, it says how many it has, and takes in the others
HALF_LIVES = (4, 16, 32, 64, 256)
WARM_UP = 4  # the first of so many parts of the text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["default", "shape:olmoe-1b-7b,layers=4"], metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    parser.add_argument("--shares", type=float, nargs="+", default=[1 / 6, 1 / 3, 2 / 3], help="of the experts")
    options = parser.parse_args(arguments)
    machine, figures = describe(), list[dict[str, Any]]()
    for model in options.models:
        checkpoint = Checkpoint(resolve_model(model))
        text = encode_text(
            checkpoint.folder, checkpoint.config.vocab_size, calibration_text(None), *[options.tokens] * 2
        )
        chosen, experts = record(checkpoint, text), checkpoint.config.num_experts
        figures += [{"model": model, "share": share, **compare(chosen, experts, share)} for share in options.shares]
    _print(figures)
    print(f"written to {write('tiers', machine, vars(options), figures)}", file=sys.stderr)
    return 0


def compare(chosen: NDArray[np.int64], experts: int, share: float) -> dict[str, float]:
    """The share found of what a record [L, T, K] asks for, with memory for ``share`` of the experts."""
    layers = len(chosen)
    slots = max(1, int(layers * experts * share))
    memories = {f"LRFU {half_life}": _lrfu(slots, half_life * layers) for half_life in HALF_LIVES}
    memories |= {"LRU": _lru(slots), "foresight": _foresight(slots, [*_asks(chosen)])}
    found = {}
    for name, memory in memories.items():
        hits = [memory(keys) for keys in _asks(chosen)]
        counted = hits[len(hits) // WARM_UP :]
        found[name] = sum(counted) / (len(counted) * chosen.shape[2])
    return found


def _asks(chosen: NDArray[np.int64]) -> Iterator[list[Key]]:
    """Token by token, layer by layer."""
    for token in range(chosen.shape[1]):
        for layer in range(len(chosen)):
            yield [(layer, int(expert)) for expert in chosen[layer, token]]


def _lrfu(slots: int, half_life: float) -> Memory:
    residency = Residency[Key](slots, half_life)

    def ask(keys: list[Key]) -> int:
        residency.touch(keys)
        missing = [key for key in keys if key not in residency]
        for key in keys:
            residency.pin(key)
        for key in missing:
            residency.take(key)
        for key in keys:
            residency.unpin(key)
        return len(keys) - len(missing)

    return ask


def _lru(slots: int) -> Memory:
    recent = OrderedDict[Key, None]()

    def ask(keys: list[Key]) -> int:
        hits = sum(key in recent for key in keys)
        for key in keys:
            recent[key] = None
            recent.move_to_end(key)
        while len(recent) > slots:
            recent.popitem(last=False)
        return hits

    return ask


def _foresight(slots: int, asks: list[list[Key]]) -> Memory:
    later: dict[Key, list[int]] = {}  # when each is asked for, the next time last
    for moment in range(len(asks) - 1, -1, -1):
        for key in asks[moment]:
            later.setdefault(key, []).append(moment)
    held = set[Key]()
    moments = count()

    def ask(keys: list[Key]) -> int:
        assert keys == asks[next(moments)]
        hits = sum(key in held for key in keys)
        for key in keys:
            later[key].pop()
        held.update(keys)
        while len(held) > slots:
            held.remove(max(held, key=lambda key: later[key][-1] if later[key] else len(asks)))
        return hits

    return ask


def _print(figures: list[dict[str, Any]]) -> None:
    policies = [name for name in figures[0] if name not in ("model", "share")]
    table = Table("model", "in memory", *policies, box=box.SIMPLE_HEAD, caption="share found of what is asked for")
    for each in figures:
        table.add_row(each["model"], f"{each['share']:.2f}", *(f"{each[name]:.3f}" for name in policies))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
