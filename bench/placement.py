"""Placements of ours and EPLB's on the same loads: how evenly busy the workers are, what moves, how long it takes.

`python -m bench.placement`. Balance is the busiest worker's time over the mean, 1 is perfect; "worst" is that of the
worst layer. Loads are Zipf's and what the gate of a model was recorded to ask for (planned on the first half of a
text, measured on the second). EPLB takes all workers for equal, and so gets as many slots on each of them as there are
on the mean, whether they fit or not; copies share as with our gateways, and evenly, as it intends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from bench.eplb import balance as eplb
from bench.expert_record import count, record
from bench.machine import describe
from bench.report import write
from consilium.checkpoint import Checkpoint
from consilium.models import resolve_model
from consilium.quantize.text import calibration_text, encode_text
from router_service.placement import Demand, Plan, Policy, WorkerSpec, levels, place

Floats = NDArray[np.float64]
ROW_SECONDS, READ_SECONDS = 1e-5, 8e-5  # of a worker of speed 1: reading an expert takes as long as 8 rows of it
DRIFT = 0.3  # loads change by up to so much before the second placement


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=__doc__)
    parser.add_argument("--model", default="shape:olmoe-1b-7b,layers=2", help="whose gates are recorded")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text")
    parser.add_argument("--step", type=int, default=16, help="tokens in a step")
    options = parser.parse_args(arguments)
    machine = describe()
    four = workers([(1, 12), (2, 16), (2, 24), (4, 32)])
    figures = [compare("Zipf 1.0, 4 unequal workers", four, zipf(1, 64, 1.0))]
    figures.append(compare("Zipf 1.0, the same with 2 copies", more_room(four, 2), zipf(1, 64, 1.0), replicas=2))
    for exponent in (0.5, 1.0):
        many = workers([(1, 61 * 5)] * 64)
        figures.append(compare(f"Zipf {exponent}, 61 layers × 256, 64 workers", many, zipf(61, 256, exponent)))
    chosen, experts = recorded(options.model, options.tokens)
    first, second = (_demand(*count(half, experts, options.step)) for half in np.array_split(chosen, 2, axis=1))
    layers = len(chosen)
    unequal = workers([(1, 12 * layers), (2, 16 * layers), (2, 24 * layers), (4, 32 * layers)])
    figures.append(compare(f"recorded, {options.model}, 4 unequal", unequal, first, second))
    equal = workers([(1, 20 * layers)] * 4)
    figures.append(compare(f"recorded, {options.model}, 4 equal", equal, first, second))
    _print(figures)
    print(f"written to {write('placement', machine, vars(options), figures)}", file=sys.stderr)
    return 0


def workers(speeds: Sequence[tuple[float, int]]) -> list[WorkerSpec]:
    """Workers of these speeds and numbers of places."""
    return [
        WorkerSpec(f"worker-{index:02}", room, ROW_SECONDS / speed, READ_SECONDS / speed)
        for index, (speed, room) in enumerate(speeds)
    ]


def more_room(known: Sequence[WorkerSpec], times: int) -> list[WorkerSpec]:
    return [replace(each, capacity=each.capacity * times) for each in known]


def zipf(layers: int, experts: int, exponent: float) -> Demand:
    """In every layer other experts are the popular ones."""
    share = 1 / np.arange(1, experts + 1) ** exponent
    random = np.random.default_rng(0)
    rows = np.stack([random.permutation(share / share.sum()) for _ in range(layers)])
    return _demand(1000 * rows, 100 * (1 - (1 - rows) ** 16))  # reads: of steps of 16 pairs


def recorded(model: str, tokens: int) -> tuple[NDArray[np.int64], int]:
    """Experts [L, T, K] of each token of a text, and how many experts there are."""
    checkpoint = Checkpoint(resolve_model(model))
    text = encode_text(checkpoint.folder, checkpoint.config.vocab_size, calibration_text(None), tokens, tokens)
    return record(checkpoint, text), checkpoint.config.num_experts


def compare(
    name: str, specs: Sequence[WorkerSpec], demand: Demand, later: Demand | None = None, replicas: int = 1
) -> dict[str, Any]:
    """Place by ``demand`` and measure by ``later``, where that is another one."""
    measured, policy = later or demand, Policy(replicas=replicas)
    started = time.perf_counter()
    ours = place(specs, {}, demand, policy)
    seconds = time.perf_counter() - started
    slots = sum(min(each.capacity // len(demand.layers), demand.rows.shape[1]) for each in specs)
    slots -= slots % len(specs)
    started = time.perf_counter()
    theirs = _eplb_holders(specs, demand, slots)
    eplb_seconds = time.perf_counter() - started
    moved = _after_drift(measured, lambda drifted: _loads(place(specs, ours.holders, drifted, policy)))
    eplb_moved = _after_drift(measured, lambda drifted: _new_copies(theirs, _eplb_holders(specs, drifted, slots)))
    return {
        "load": name,
        "copies": sum(map(len, ours.holders.values())),
        "eplb_copies": sum(map(len, theirs.values())),
        "balance": _balance(specs, ours.holders, measured),
        "eplb_balance": _balance(specs, theirs, measured),
        "eplb_balance_equal_shares": _equal_share_balance(specs, theirs, measured),
        "seconds": seconds,
        "eplb_seconds": eplb_seconds,
        "moves_after_drift": moved,
        "eplb_moves_after_drift": eplb_moved,
    }


Holders = dict[tuple[int, int], tuple[str, ...]]


def _demand(rows: Floats, reads: Floats) -> Demand:
    return Demand(tuple(range(len(rows))), rows, reads)


def _eplb_holders(specs: Sequence[WorkerSpec], demand: Demand, slots: int) -> Holders:
    """Its load is one number: the seconds that an expert takes on a worker of speed 1."""
    load = demand.rows * ROW_SECONDS + demand.reads * READ_SECONDS
    holders: dict[tuple[int, int], list[str]] = {}
    for layer, of_layer in zip(demand.layers, load, strict=True):
        for spec, experts in zip(specs, eplb(of_layer, len(specs), slots), strict=True):
            for expert in experts:
                holders.setdefault((layer, expert), []).append(spec.name)
    return {expert: tuple(names) for expert, names in holders.items()}


def _after_drift(demand: Demand, moves: Callable[[Demand], int]) -> int:
    random = np.random.default_rng(1)
    factor = random.uniform(1 - DRIFT, 1 + DRIFT, demand.rows.shape)
    return moves(Demand(demand.layers, demand.rows * factor, demand.reads * factor))


def _loads(plan: Plan) -> int:
    return len(plan.loads)


def _new_copies(before: Holders, after: Holders) -> int:
    return sum(len(set(names) - set(before[expert])) for expert, names in after.items())


def _balance(specs: Sequence[WorkerSpec], holders: Any, demand: Demand) -> dict[str, float]:
    busy, mean = levels(specs, holders, demand)
    return _summary(busy.max(axis=1) / mean)


def _equal_share_balance(specs: Sequence[WorkerSpec], holders: Holders, demand: Demand) -> dict[str, float]:
    _, mean = levels(specs, holders, demand)
    cost, busy = demand.cost(specs, prior=0.0), np.zeros((len(demand.layers), len(specs)))
    places = {each.name: index for index, each in enumerate(specs)}
    for (layer, expert), names in holders.items():
        for name in names:
            busy[layer, places[name]] += cost[layer, expert, places[name]] / len(names)
    return _summary(busy.max(axis=1) / mean)


def _summary(ratios: Floats) -> dict[str, float]:
    return {"mean": float(ratios.mean()), "worst": float(ratios.max())}


def _print(figures: Sequence[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, caption="busiest/mean, mean of the layers (worst layer)", caption_justify="left")
    for heading in ("load", "ours", "EPLB", "EPLB, equal shares", "copies", "moves after drift", "seconds"):
        table.add_column(heading, justify="left" if heading == "load" else "right")
    for each in figures:
        balances = [each[key] for key in ("balance", "eplb_balance", "eplb_balance_equal_shares")]
        table.add_row(
            each["load"],
            *(f"{found['mean']:.3f} ({found['worst']:.3f})" for found in balances),
            f"{each['copies']} / {each['eplb_copies']}",
            f"{each['moves_after_drift']} / {each['eplb_moves_after_drift']}",
            f"{each['seconds']:.3f} / {each['eplb_seconds']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
