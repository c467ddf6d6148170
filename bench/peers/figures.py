"""What every peer reports: values of one kind of work, one for each repeat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every peer."""

    threads: int
    repeats: int
    batches: tuple[int, ...]  # sequences that decode at once
    context: int  # tokens of prompt before decode is measured
    tokens: int  # decoded by each sequence
    prompt: int  # tokens of one prompt for prefill


@dataclass(slots=True)
class Figure:
    """Tokens per second of all sequences together, or milliseconds, in the order in which they were taken."""

    peer: str
    model: str
    work: str  # decode, prefill, or what a call is
    batch: int  # sequences, or rows of a call
    values: list[float] = field(default_factory=list)
    unit: str = "tok/s"

    def to_json(self) -> dict[str, Any]:
        """With the median, and the spread as (largest - smallest) / median."""
        middle = median(self.values)
        return {
            "peer": self.peer,
            "model": self.model,
            "work": self.work,
            "batch": self.batch,
            "unit": self.unit,
            "median": middle,
            "spread": (max(self.values) - min(self.values)) / middle,
            "values": self.values,
        }


def merge(figures: Iterable[Figure]) -> list[Figure]:
    """One figure for each thing measured, the values of all its repeats in it."""
    merged: dict[tuple[str, str, str, int], Figure] = {}
    for each in figures:
        key = (each.peer, each.model, each.work, each.batch)
        same = merged.setdefault(key, Figure(each.peer, each.model, each.work, each.batch, unit=each.unit))
        same.values += each.values
    return list(merged.values())


def table(figures: Sequence[Figure]) -> Table:
    """One row per figure."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("peer", "model", "work", "batch"):
        shown.add_column(heading)
    for heading in ("median", "", "spread", "repeats"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        content = each.to_json()
        numbers = (f"{content['median']:.2f}", each.unit, f"{content['spread']:.1%}", str(len(each.values)))
        shown.add_row(each.peer, each.model, each.work, str(each.batch), *numbers)
    return shown
