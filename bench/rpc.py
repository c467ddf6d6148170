"""Round trips to a worker that computes nothing, by size and transport, beside a bare socket.

`python -m bench.rpc`: every size goes out and comes back, as float32 rows of a frame. What is timed is all that a frame
costs besides its arithmetic: encode, way, queue, decode of the call, the copy of its rows, and the way back. The bare
socket is a stream between two Python processes that only send and receive as many bytes.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import distribution
from bench.layer_stack import LAYER, Gateway, LayerShape, connected, random_layer
from bench.machine import describe
from bench.report import write
from bench.sockets import receive
from consilium.frames import Frame
from gateway.worker import Worker
from tests.stack import running

HIDDEN = 1024  # float32: a row takes 4 KiB
SHAPE = LayerShape(HIDDEN, 64, 2, 2)
SIZES = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22)
PATIENCE = 30.0  # seconds for one round trip


def frame_of(size: int) -> Frame:
    """As many rows as take ``size`` bytes, all for one expert."""
    count = size // (4 * HIDDEN)
    return Frame(LAYER, torch.randn(count, HIDDEN), None, [0], [0, count], torch.arange(count, dtype=torch.int32))


def calls(gateway: Gateway, size: int) -> Callable[[], None]:
    """One round trip; checks that the rows come back."""
    frame = frame_of(size)
    worker: Worker = next(iter(gateway.dispatcher.workers.values()))

    async def call() -> None:
        reply = await worker.send(frame, time.monotonic() + PATIENCE)
        rows = reply.rows(len(frame.rows), HIDDEN, torch.float32)
        if rows[-1, -1] != frame.rows[-1, -1]:
            raise RuntimeError("the rows that came back are others")
        reply.release()

    return lambda: gateway.mailbox.drive(call())


def seconds(call: Callable[[], None], count: int) -> list[float]:
    """The time of each of ``count`` round trips, after some that do not count."""
    for _ in range(max(5, count // 10)):
        call()
    found = list[float]()
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def bare(size: int, count: int) -> list[float]:
    """The same with a stream socket and another process that sends back what it gets."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        ours.close()
        _echo(theirs, size)
        os._exit(0)
    theirs.close()
    content, buffer = bytes(size), memoryview(bytearray(size))

    def call() -> None:
        ours.sendall(content)
        receive(ours, buffer)

    with ours:
        found = seconds(call, count)
    os.waitpid(child, 0)
    return found


def _echo(link: socket.socket, size: int) -> None:
    buffer = memoryview(bytearray(size))
    while receive(link, buffer):
        link.sendall(buffer)


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.rpc", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES", help="multiples of 4096")
    parser.add_argument("--calls", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, figures = describe(), list[dict[str, Any]]()
    for size in options.sizes:
        figures.append({"way": "bare socket", "bytes": size, "seconds": distribution(bare(size, options.calls))})
    with random_layer(SHAPE) as model:
        flags = ["--model", str(model), "--quantization", "none", "--dtype", "float32", "--threads", "1", "--port", "0"]
        with running(["bench.echo_worker", *flags]) as worker:
            for way, links in (("local", True), ("gRPC", False)):
                with connected(model, [worker.address], links, "none") as gateway:
                    for size in options.sizes:
                        found = distribution(seconds(calls(gateway, size), options.calls))
                        figures.append({"way": way, "bytes": size, "seconds": found})
    table = Table("way", *(f"{size // 1024} KiB" for size in options.sizes), box=box.SIMPLE_HEAD, caption="µs: p50/p95")
    for way in ("bare socket", "local", "gRPC"):
        times = [each["seconds"] for each in figures if each["way"] == way]
        table.add_row(way, *(f"{each['p50'] * 1e6:.0f}/{each['p95'] * 1e6:.0f}" for each in times))
    Console().print(table)
    print(f"written to {write('rpc', machine, vars(options), figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
