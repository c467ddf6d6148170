"""What the expert-output cache costs and gains: the same requests twice, without it and with each of its levels.

`python -m bench.cache` starts a stack for every mode. The first pass is cold (the cost: keys, lookups, writes), the
second one warm (the gain). Both cycles send the same prompts, so the tokens of all passes must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.table import Table

from bench.client import Request
from bench.figures import summarize
from bench.local_stack import consilium_up
from bench.machine import describe
from bench.prompts import Workload, requests_of
from bench.report import write
from bench.serve import run_level

# Flags of `consilium up`, and variables of the configuration.
# The prefix cache is off: with it a second pass would not ask for most rows at all.
WITHOUT_PREFIXES = {"CONSILIUM_GATEWAY__PREFIX_CACHE": "false"}
MODES: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "none": ((), {}),
    "memory": ((), {"CONSILIUM_CACHE__MEMORY": "1GiB"}),
    "redis": (("--cache", "1GiB"), {"CONSILIUM_CACHE__MEMORY": "0"}),
    "memory+redis": (("--cache", "1GiB"), {"CONSILIUM_CACHE__MEMORY": "1GiB"}),
}
_SHOWN = ("time_to_first_token", "inter_token_latency")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cache", description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="of all modes, one after the other")
    options = parser.parse_args(arguments)
    machine, figures = describe(), []
    for _ in range(options.rounds):
        for mode in options.modes:
            flags, variables = MODES[mode]
            with _environment({**WITHOUT_PREFIXES, **variables}), consilium_up(options.model, flags) as url:
                figures += asyncio.run(_measure(url, mode, options))
    _print(figures)
    print(f"written to {write('cache', machine, vars(options), figures)}", file=sys.stderr)
    return 1 if any(each["errors"] for each in figures) else 0


async def _measure(url: str, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of the cold and of the warm pass."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        length, count = options.prompt_tokens, options.requests
        supply = await requests_of(client, Workload(False, name, length, length, options.output_tokens, 0))
        requests: list[Request] = list(islice(supply, count + 2))
        await run_level(client, requests[count:], 1)  # others, to warm up everything but the cache
        figures = []
        for state in ("cold", "warm"):
            before = await _cache_metrics(client)
            level = summarize(await run_level(client, requests[:count], options.concurrency))
            await asyncio.sleep(2.0)  # the metrics of the cache come once in a second, and rows may wait to be written
            after = await _cache_metrics(client)
            counted = {key: value - before.get(key, 0.0) for key, value in after.items()}
            figures.append({"mode": mode, "pass": state, **level, "cache": counted})
        return figures


async def _cache_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """The counters of the cache by name and labels."""
    text = (await client.get("/metrics")).text
    samples = [each for family in text_string_to_metric_families(text) for each in family.samples]
    mine = [each for each in samples if each.name.startswith("consilium_cache") and each.name.endswith("_total")]
    return {_name(each.name, each.labels): each.value for each in mine}


def _name(name: str, labels: Mapping[str, str]) -> str:
    parts = [value for label, value in sorted(labels.items()) if label != "model_name"]
    return "_".join([name.removeprefix("consilium_cache_").removesuffix("_total"), *parts])


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _print(figures: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, caption="times in ms: p50/p95; hits of the rows asked for", caption_justify="left"
    )
    for heading in ("mode", "pass", "TTFT", "ITL", "hits in memory", "hits in Redis", "written", "dropped", "errors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in figures:
        times = [each[name] for name in _SHOWN]
        cache = each["cache"]
        errors = sum(value for name, value in cache.items() if name.startswith("errors"))
        table.add_row(
            each["mode"],
            each["pass"],
            *("/".join(f"{time[p] * 1e3:.0f}" for p in ("p50", "p95")) if time else "-" for time in times),
            *(_share(cache, tier) for tier in ("memory", "redis")),
            *(f"{cache.get(name, 0):.0f}" for name in ("written_rows", "dropped_rows")),
            f"{errors:.0f}",
        )
    Console().print(table)


def _share(cache: Mapping[str, float], tier: str) -> str:
    hits, misses = cache.get(f"hits_{tier}", 0.0), cache.get(f"misses_{tier}", 0.0)
    return f"{hits / (hits + misses):.1%}" if hits + misses else "-"


if __name__ == "__main__":
    sys.exit(main())
