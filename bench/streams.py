"""Whether clients slow the engine: N streams on connections of their own, and the same N choices on one connection.

`python -m bench.streams` prints a table and writes bench/results/streams.json. Both ways send the same prompts and get
the same tokens; they take turns on one server. Nothing is parsed while a round runs: what the client spends would be
missing from the cores that the engine needs. Between tokens counts only what lies between the first token of the last
stream and the last token of the first one, so that all N are in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.client import END_OF_STREAM
from bench.local_stack import consilium_up
from bench.machine import describe
from bench.report import write

TARGET = 1.1  # most that the time between tokens may grow
WAYS = ("own connections", "one connection")

console = Console(stderr=True)


@dataclass(slots=True)
class Recorder(asyncio.Protocol):
    """One request, and everything that came back, with its times."""

    request: bytes
    over: asyncio.Future[None]
    reads: list[tuple[float, bytes]] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.reads.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error) if error else self.over.set_result(None)


async def record(url: str, bodies: Sequence[dict[str, Any]]) -> list[list[tuple[float, bytes]]]:
    """What came for each body, each on a connection of its own, all sent at once. Raises OSError."""
    loop, parts = asyncio.get_running_loop(), urlsplit(url)
    place = parts.hostname or "127.0.0.1", parts.port or 80
    recorders = [Recorder(_post(parts.netloc, body), loop.create_future()) for body in bodies]
    for each in recorders:
        await loop.create_connection(partial(_same, each), *place)
    await asyncio.gather(*(each.over for each in recorders))
    return [each.reads for each in recorders]


def _same(recorder: Recorder) -> Recorder:
    return recorder


def _post(host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    # HTTP/1.0: the body comes as it is, and ends with the connection.
    head = f"POST /v1/completions HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


def token_times(reads: Iterable[tuple[float, bytes]]) -> dict[int, list[float]]:
    """When each choice's events came, by its index. Raises RuntimeError for anything but a whole stream."""
    rest, begun, ended = b"", False, False
    times: dict[int, list[float]] = {}
    for arrival, data in reads:
        rest += data
        if not begun and b"\r\n\r\n" in rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            begun = True
            if head.split(b" ", 2)[1] != b"200":
                raise RuntimeError(f"the server answered {head.splitlines()[0].decode()}: {rest.decode()[:200]}")
        *events, rest = rest.split(b"\n\n") if begun else [rest]
        for event in events:
            text = event.removeprefix(b"data: ")
            ended = text == END_OF_STREAM
            for choice in () if ended else json.loads(text)["choices"]:
                times.setdefault(choice["index"], []).append(arrival)
    if not ended:
        raise RuntimeError("a stream broke off")
    return times


def between_tokens(streams: Sequence[Sequence[float]]) -> list[float]:
    """Seconds from token to token while all streams run."""
    first, last = max(times[0] for times in streams), min(times[-1] for times in streams)
    gaps: list[float] = []
    for times in streams:
        inside = [each for each in times if first <= each <= last]
        gaps += [after - before for before, after in pairwise(inside)]
    if not gaps:
        raise RuntimeError("the streams did not run at the same time; ask for more --output-tokens")
    return gaps


async def measure(url: str, prompts: list[list[int]], options: argparse.Namespace, way: str) -> dict[str, float]:
    """The figures of one round."""
    common = {"model": options.served, "max_tokens": options.output_tokens, "ignore_eos": True}
    common |= {"temperature": 0, "stream": True}
    asked: list[Any] = [prompts] if way == "one connection" else list(prompts)
    before = await _steps(url)
    found = await record(url, [{**common, "prompt": prompt} for prompt in asked])
    after = await _steps(url)
    streams = [times for reads in found for times in token_times(reads).values()]
    if len(streams) != len(prompts):
        raise RuntimeError(f"{len(streams)} choices came instead of {len(prompts)}")
    gaps = between_tokens(streams)
    step = (after[0] - before[0]) / (after[1] - before[1])
    p50, p99 = np.quantile(gaps, [0.5, 0.99]).tolist()
    return {"mean": statistics.fmean(gaps), "p50": p50, "p99": p99, "engine_step": step}


async def _steps(url: str) -> tuple[float, float]:
    """Seconds and number of the engine's steps so far."""
    async with httpx.AsyncClient() as client:
        lines = (await client.get(f"{url}/metrics")).text.splitlines()
    seconds, count = (
        next(float(line.split()[-1]) for line in lines if line.startswith(f"consilium_iteration_seconds_{name}"))
        for name in ("sum", "count")
    )
    return seconds, count


async def run(url: str, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of every round by way; each way is first in every other round."""
    async with httpx.AsyncClient(base_url=url) as client:
        options.served = (await client.get("/v1/models")).json()["data"][0]["id"]
    random_ = random.Random(options.seed)
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(-1, options.rounds):
        # Other prompts in each round, or the prefix cache would know them; the same for both ways but for one token.
        drawn = [random_.sample(range(10, 300), options.prompt_tokens) for _ in range(options.streams)]
        for turn, way in enumerate(WAYS if number % 2 else reversed(WAYS)):
            figures = await measure(url, [[300 + turn, *prompt] for prompt in drawn], options, way)
            if number >= 0:  # the one before is to warm up
                rounds[way].append(figures)
    return rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when the server cannot be used."""
    options = _parse(arguments)
    machine = describe()
    parameters = {key: value for key, value in vars(options).items() if key != "name"}
    with ExitStack() as cleanup:
        try:
            url = options.url or cleanup.enter_context(consilium_up(options.start, shlex.split(options.up)))
            rounds = asyncio.run(run(url, options))
        except (RuntimeError, OSError, httpx.HTTPError) as error:
            console.print(f"error: {error or type(error).__name__}", style="bold red")
            return 1
    ratio = statistics.median(own["mean"] / one["mean"] for own, one in zip(*rounds.values(), strict=True))
    _print(rounds, ratio)
    figures = {"rounds": rounds, "ratio_of_means": ratio, "target": TARGET}
    console.print(f"written to {write(options.name, machine, parameters, figures)}")
    return 0


def _print(rounds: dict[str, list[dict[str, float]]], ratio: float) -> None:
    caption = f"ms, medians of the rounds; own connections cost {ratio:.3f} times one (at most {TARGET} is the target)"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("", "between tokens", "p50", "p99", "engine's step"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for way, figures in rounds.items():
        names = ("mean", "p50", "p99", "engine_step")
        table.add_row(way, *(f"{1e3 * statistics.median(each[name] for each in figures):.1f}" for name in names))
    Console().print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__)
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--url", help="a running server, for example http://127.0.0.1:8000")
    server.add_argument("--start", metavar="MODEL", default="default", help="start `consilium up` with it (default)")
    parser.add_argument("--up", metavar="FLAGS", default="", help="further flags of `consilium up`, in quotes")
    parser.add_argument("--streams", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="streams", help="of the result, bench/results/NAME.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
