"""How much the load generator itself adds: it runs against a server that computes nothing and says when it sent.

`python -m bench.overhead` prints, for each concurrency, how late the client saw a token and what a token cost it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from bench.client import END_OF_STREAM, Request, events
from bench.figures import distribution
from bench.machine import describe
from bench.report import write


@contextmanager
def fake_server(interval: float) -> Iterator[str]:
    """The URL of a fake server in a process of its own."""
    command = [sys.executable, "-m", "bench.fake_server", str(interval)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


async def lateness(url: str, concurrency: int, tokens: int) -> dict[str, Any]:
    """Seconds between a token's sending and its arrival in the client, and the client's CPU seconds per token."""
    body = {"model": "fake", "prompt": "x", "max_tokens": tokens, "stream": True}
    request = Request("/v1/completions", body, tokens)
    late: list[float] = []

    async def send() -> None:
        async with client.stream("POST", request.path, json=request.body) as response:
            async for _, data in events(response):
                if data != END_OF_STREAM:
                    late.append(time.monotonic() - json.loads(data)["sent"])

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await send()
        late.clear()
        start, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(send() for _ in range(concurrency)))
        cpu, elapsed = time.process_time() - cpu, time.monotonic() - start
    return {
        "concurrency": concurrency,
        "tokens_per_second": len(late) / elapsed,
        "lateness": distribution(late),
        "client_cpu_seconds_per_token": cpu / len(late),
    }


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--interval", type=float, default=0.05, metavar="SECONDS", help="between two tokens")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    machine = describe()
    with fake_server(options.interval) as url:
        figures = [asyncio.run(lateness(url, each, options.tokens)) for each in options.concurrency]
    print(json.dumps(figures, indent=2))
    print(f"written to {write('overhead', machine, vars(options), figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
