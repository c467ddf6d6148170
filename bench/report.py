"""Figures for people, as a table, and for programs, as JSON with what they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
_TIMES = {"TTFT": "time_to_first_token", "ITL": "inter_token_latency", "latency": "request_latency"}


def write(name: str, machine: Mapping[str, Any], parameters: Mapping[str, Any], figures: Any) -> Path:
    """bench/results/NAME.json; ``machine`` was described before the figures were taken. Raises OSError."""
    file = RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "machine": machine, "parameters": parameters, "figures": figures}
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return file


def print_levels(levels: Sequence[Mapping[str, Any]]) -> None:
    """One row per concurrency; of an open loop per rate, with the most requests that were in flight."""
    caption = "tok/s: of the output/with the prompts; times in ms: p50/p95/p99"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("at once", "requests", "tok/s", *_TIMES):
        table.add_column(heading, justify="right", no_wrap=True)
    for level in levels:
        failed = sum(level["errors"].values())
        table.add_row(
            str(level["concurrency"]) + (f" at {level['rate']:g}/s" if "rate" in level else ""),
            f"{level['requests']}" + (f", {failed} failed" if failed else ""),
            f"{level['output_tokens_per_second']:.1f}/{level['total_tokens_per_second']:.1f}",
            *(_milliseconds(level[key]) for key in _TIMES.values()),
        )
    console = Console()
    console.print(table)
    for level in levels:
        for error, count in level["errors"].items():
            console.print(f"{level['concurrency']} at once: {count} × {error}", style="bold red")


def _milliseconds(times: Mapping[str, float] | None) -> str:
    milliseconds = [times[name] * 1e3 for name in ("p50", "p95", "p99")] if times else []
    return "/".join(f"{each:.0f}" if each >= 10 else f"{each:.1f}" for each in milliseconds) or "-"
