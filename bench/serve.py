"""The load benchmark: streamed requests against an OpenAI-style server.

A closed loop at several concurrencies, or with --rate an open one: requests come at random (a Poisson process)
whatever the server makes of those before, so that waiting shows.
Lengths are exact (`ignore_eos`), prompts all differ, and every level is warmed up before it is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import httpx
from rich.console import Console

from bench.client import Request, Sample, measure
from bench.figures import Level, summarize
from bench.local_stack import consilium_up
from bench.machine import describe
from bench.prompts import Workload, requests_of
from bench.report import print_levels, write

OPEN_SECONDS = 60  # how long an open level lasts by default

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a request failed or the server cannot be used."""
    options = _parse(arguments)
    machine = describe()
    with ExitStack() as cleanup:
        try:
            url = options.url or cleanup.enter_context(consilium_up(options.start, shlex.split(options.up)))
            levels = asyncio.run(run(url, options))
        except (RuntimeError, httpx.HTTPError) as error:
            console.print(f"error: {error or type(error).__name__}", style="bold red")
            return 1
    print_levels(levels)
    console.print(f"written to {write(options.name, machine, _parameters(options), levels)}")
    return 1 if any(level["errors"] for level in levels) else 0


async def run(url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every level. Raises httpx.HTTPError when the server cannot be reached."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=options.timeout) as client:
        model = options.model or await _first_model(client)
        shortest, longest = options.prompt_tokens
        workload = Workload(options.endpoint == "chat", model, shortest, longest, options.output_tokens, options.seed)
        supply = await requests_of(client, workload)
        levels = []
        for concurrency in () if options.rate else options.concurrency:
            count = options.requests or max(8, 4 * concurrency)
            with console.status(f"{count} requests, {concurrency} at once"):
                await run_level(client, list(islice(supply, options.warmup)), concurrency)
                level = await run_level(client, list(islice(supply, count)), concurrency)
            levels.append(summarize(level))
        for rate in options.rate or ():
            count = options.requests or max(8, round(OPEN_SECONDS * rate))
            with console.status(f"{count} requests, {rate:g} in a second"):
                await run_level(client, list(islice(supply, options.warmup)), max(1, options.warmup))
                level = await run_open(client, list(islice(supply, count)), rate, random.Random(options.seed))
            levels.append({**summarize(level), "rate": rate})
        return levels


async def run_level(client: httpx.AsyncClient, requests: Sequence[Request], concurrency: int) -> Level:
    """Send ``requests`` with ``concurrency`` of them in flight until none is left."""
    pending, samples = iter(requests), list[Sample]()
    start, cpu = time.perf_counter(), time.process_time()

    async def send(pending: Iterator[Request]) -> None:
        for request in pending:
            samples.append(await measure(client, request))

    await asyncio.gather(*(send(pending) for _ in range(concurrency)))
    return Level(concurrency, samples, time.perf_counter() - start, time.process_time() - cpu)


async def run_open(
    client: httpx.AsyncClient, requests: Sequence[Request], rate: float, random_: random.Random
) -> Level:
    """Send ``requests`` at random moments, ``rate`` of them in a second on average, and wait for all the answers.

    The level's concurrency is the most that were in flight at once.
    """
    in_flight = most = 0
    samples = list[Sample]()
    start, cpu = time.perf_counter(), time.process_time()

    async def send(request: Request) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        samples.append(await measure(client, request))
        in_flight -= 1

    due = start
    async with asyncio.TaskGroup() as group:
        for request in requests:
            await asyncio.sleep(due - time.perf_counter())  # by the clock: a late request delays none after it
            group.create_task(send(request))
            due += random_.expovariate(rate)
    return Level(most, samples, time.perf_counter() - start, time.process_time() - cpu)


async def _first_model(client: httpx.AsyncClient) -> str:
    response = await client.get("/v1/models")
    response.raise_for_status()
    return str(response.json()["data"][0]["id"])


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked, as the result states it; never a key."""
    server = options.url or f"consilium up --model {options.start} {options.up}".strip()
    chosen = (
        "model",
        "endpoint",
        "concurrency",
        "rate",
        "requests",
        "prompt_tokens",
        "output_tokens",
        "warmup",
        "seed",
    )
    return {"server": server, **{name: getattr(options, name) for name in chosen}}


def _range(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition(":")
    lengths = _positive(shortest), _positive(longest or shortest)
    if lengths[0] > lengths[1]:
        raise argparse.ArgumentTypeError(f"{text} falls; write SHORTEST:LONGEST")
    return lengths


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a rate; write requests in a second, such as 0.5")
    return rate


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="a running server, for example http://127.0.0.1:8000")
    server.add_argument("--start", metavar="MODEL", default="default", help="start `consilium up` with it (default)")
    parser.add_argument("--up", metavar="FLAGS", default="", help="further flags of `consilium up`, in quotes")
    parser.add_argument("--model", help="the model's name in requests; the server's first by default")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--concurrency", type=_positive, nargs="+", default=[1, 8, 32], metavar="N")
    rate_help = "requests in a second instead, whatever is in flight (an open loop)"
    parser.add_argument("--rate", type=_rate, nargs="+", metavar="R", help=rate_help)
    parser.add_argument("--requests", type=_positive, help="per level; 4 × concurrency (60 s with --rate), at least 8")
    parser.add_argument("--prompt-tokens", type=_range, default=(32, 96), metavar="N[:M]", help="uniform; 32:96")
    parser.add_argument("--output-tokens", type=_positive, default=64, metavar="N")
    parser.add_argument("--warmup", type=int, default=4, metavar="N", help="requests before each level; 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest silence of the server")
    parser.add_argument("--name", default="serve", help="of the result, bench/results/NAME.json")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
