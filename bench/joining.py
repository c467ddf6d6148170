"""How soon a worker that joins is of use: from its start until it listens, has loaded, and computes its first rows.

`python -m bench.joining`. A router, two workers and a gateway under load; one worker more joins, measured, and leaves
again, some times. When it has loaded is what the router says; when it computes is what its own metrics say.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc
import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import distribution
from bench.machine import describe
from bench.report import write
from consilium.rpc import router_channel_options
from protos.router.v1 import router_pb2, router_pb2_grpc
from tests.stack import Process, launch, running, wait_ready, worker_argv

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.01
PHASES = ("listens", "has loaded", "computes")  # the last one counts from when it had loaded


class Deployment:
    """What the measured worker joins."""

    def __init__(self, model: str, cleanup: ExitStack) -> None:
        self._model = model
        router = cleanup.enter_context(running(["router_service", "--model", model, "--port", "0"]))
        self._router = router.address
        channel = grpc.insecure_channel(router.address.removeprefix("grpc://"), options=router_channel_options())
        cleanup.enter_context(channel)
        self._stub = router_pb2_grpc.RouterServiceStub(channel)
        for _ in range(2):
            cleanup.enter_context(running(self.worker()))
        gateway = ["gateway", "--model", model, "--router", router.address, "--port", "0", "--threads", "1"]
        self.gateway = cleanup.enter_context(running(gateway))
        wait_ready(self.gateway)
        until(lambda: self.loaded(2))

    def worker(self) -> list[str]:
        return worker_argv("all", "--model", self._model, "--join", self._router, "--speed", "1", "--metrics-port", "0")

    def loaded(self, workers: int) -> bool:
        """Whether so many have leases, and hold what they shall."""
        found = self._stub.GetPlacement(router_pb2.GetPlacementRequest(), timeout=WAIT_SECONDS).workers
        return len(found) == workers and all(each.held == each.wanted > 0 for each in found)


def until(condition: Callable[[], bool]) -> float:
    """When it held, on the monotonic clock. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {WAIT_SECONDS:g} s in vain")
        time.sleep(POLL_SECONDS)
    return time.monotonic()


def computes(worker: Process) -> bool:
    """Whether it has computed a row."""
    text = httpx.get(worker.metrics, timeout=WAIT_SECONDS).text
    found = re.findall(r"^consilium_expert_service_rows_total(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found)) > 0


def join(deployment: Deployment) -> list[float]:
    """Seconds of PHASES of one worker, which has left at the end."""
    started = time.monotonic()
    worker = launch(deployment.worker())
    try:
        worker.wait_listening()
        listens = time.monotonic()
        loaded = until(lambda: deployment.loaded(3))
        first = until(lambda: computes(worker))
    finally:
        worker.stop()
    until(lambda: deployment.loaded(2))
    return [listens - started, loaded - started, first - loaded]


@contextmanager
def load(url: str, streams: int) -> Iterator[None]:
    """So many clients that ask without a pause. Raises RuntimeError at the end when a request failed."""
    stopping, failed = threading.Event(), list[str]()

    def ask(client: int) -> None:
        body = {"prompt": [client + 2, 5, 6], "max_tokens": 16, "ignore_eos": True}
        while not stopping.is_set():
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_SECONDS)
            if answer.is_error:
                failed.append(answer.text)

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(streams)]
    for each in clients:
        each.start()
    try:
        yield
    finally:
        stopping.set()
        for each in clients:
            each.join()
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.joining", description=__doc__)
    parser.add_argument("--model", default="shape:tiny")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args(arguments)
    machine = describe()
    with ExitStack() as cleanup:
        deployment = Deployment(options.model, cleanup)
        cleanup.enter_context(load(deployment.gateway.address, options.streams))
        joins = [join(deployment) for _ in range(options.times)]
    found = {name: [each[place] for each in joins] for place, name in enumerate(PHASES)}
    table = Table("seconds", "median", "most", box=box.SIMPLE_HEAD)
    for name, seconds in found.items():
        table.add_row(name, f"{sorted(seconds)[len(seconds) // 2]:.2f}", f"{max(seconds):.2f}")
    Console().print(table)
    figures = {name: distribution(seconds) for name, seconds in found.items()}
    print(f"written to {write('joining', machine, vars(options), figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
