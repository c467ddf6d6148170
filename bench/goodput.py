"""Goodput while workers are killed: what clients get in an open loop, undisturbed and with kills every few seconds.

`python -m bench.goodput`. Every expert has a replica. Workers take a fixed time for a frame (bench.emulated_worker),
for two cores cannot host what is measured otherwise. Whoever is killed is started again at once, on the same cores. The
rate is a share of what the same deployment does in a closed loop.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from bench.client import Request
from bench.figures import Level
from bench.machine import describe
from bench.prompts import Workload, requests_of
from bench.report import write
from bench.serve import run_level, run_open
from tests.stack import Process, launch, running, wait_ready

MODEL = ("--model", "shape:tiny")
CLOSED = 16  # requests at once that measure the capacity


class Crew:
    """Workers that all hold everything."""

    def __init__(self, options: argparse.Namespace, cleanup: ExitStack) -> None:
        self._argv = ["bench.emulated_worker", str(options.service), "--threads", "1", *MODEL, "--port"]
        self._cleanup = cleanup
        self.workers = [self._launch("0") for _ in range(options.workers)]
        for worker in self.workers:
            worker.wait_listening()
        self.kills = 0

    def _launch(self, port: str) -> Process:
        worker = launch([*self._argv, port])
        self._cleanup.callback(worker.stop, signal.SIGKILL)
        return worker

    async def kill_again_and_again(self, seconds: float, chance: random.Random) -> None:
        """One at a time, at random; each is started again at once, and is back before the next one goes."""
        while True:
            begun = time.monotonic()
            await asyncio.sleep(seconds * chance.uniform(0.2, 0.4))
            number = chance.randrange(len(self.workers))
            old = self.workers[number]
            old.stop(signal.SIGKILL)
            self.kills += 1
            self.workers[number] = self._launch(old.address.rsplit(":", 1)[1])
            await asyncio.to_thread(self.workers[number].wait_listening)
            await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))


def figures(level: Level, seconds: float) -> dict[str, Any]:
    """Of one open loop that offered load for so many seconds."""
    good = [each for each in level.samples if each.error is None]
    gaps = [gap for each in good for gap in [each.time_to_first_token(), *each.gaps()]]
    return {
        "requests": len(level.samples),
        "failed": len(level.samples) - len(good),
        "goodput": sum(each.completion_tokens for each in good) / max(seconds, level.seconds),
        "longest_stall": max(gaps, default=0.0),
    }


async def measure(url: str, crew: Crew, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity, then both open loops on the same requests at the same moments."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        supply = await requests_of(client, Workload(False, name, 8, 24, options.output_tokens, options.seed))
        await run_level(client, list(islice(supply, CLOSED)), CLOSED)
        closed = await run_level(client, list(islice(supply, 4 * CLOSED)), CLOSED)
        capacity = sum(each.completion_tokens for each in closed.samples) / closed.seconds
        rate = options.load * capacity / options.output_tokens
        requests = list(islice(supply, max(8, round(rate * options.seconds))))
        undisturbed = await open_loop(client, requests, rate, options)
        killing = asyncio.ensure_future(crew.kill_again_and_again(options.kill_every, random.Random(options.seed)))
        disturbed = await open_loop(client, requests, rate, options)
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
    return {
        "capacity": capacity,
        "rate": rate,
        "kills": crew.kills,
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "ratio": disturbed["goodput"] / undisturbed["goodput"],
    }


async def open_loop(
    client: httpx.AsyncClient, requests: list[Request], rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    return figures(await run_open(client, requests, rate, random.Random(options.seed)), options.seconds)


def rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name in ("undisturbed", "disturbed"):
        each = found[name]
        counts = str(each["requests"]), str(each["failed"])
        yield name, *counts, f"{each['goodput']:.1f}", f"{each['longest_stall'] * 1e3:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 when a request failed."""
    options = _parse(arguments)
    machine = describe()
    with ExitStack() as cleanup:
        crew = Crew(options, cleanup)
        endpoints = [part for each in crew.workers for part in ("--group-endpoint", f"experts={each.address}")]
        gateway = cleanup.enter_context(running(["gateway", *MODEL, "--port", "0", "--threads", "1", *endpoints]))
        wait_ready(gateway)
        found = asyncio.run(measure(gateway.address, crew, options))
    caption = f"{found['kills']} kills at {found['rate']:.1f} requests/s; goodput {found['ratio']:.3f} of undisturbed"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("", "requests", "failed", "tok/s", "longest stall, ms"):
        table.add_column(heading, justify="right")
    for row in rows(found):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"written to {write(options.name, machine, vars(options), found)}")
    return 1 if found["undisturbed"]["failed"] or found["disturbed"]["failed"] else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--service", type=float, default=4.0, help="ms that a worker takes for a frame")
    parser.add_argument("--load", type=float, default=0.4, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each open loop")
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="goodput", help="of the result, bench/results/NAME.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
