"""Hosts in network namespaces of one machine, a slow link between them, and what the link takes by itself.

`python -m bench.namespaces listen IP OUT BACK` and `... ask IP PORT OUT BACK CALLS` are the two ends of `bare_seconds`.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.sockets import receive

NEAR, FAR = (f"consilium-{os.getpid()}-{side}" for side in ("near", "far"))
NEAR_IP, FAR_IP = "10.213.78.1", "10.213.78.2"

Command = tuple[str, ...]


def inside(namespace: str) -> Command:
    """The command that runs another one in a namespace."""
    return ("ip", "netns", "exec", namespace)


@contextmanager
def namespaces(delay_command: Sequence[str], delay_ms: float, mtu: int) -> Iterator[int]:
    """NEAR and FAR, joined by a link with ``delay_ms`` each way; the pid of the tool that is the link.

    Raises RuntimeError when the tool fails.
    """
    with ExitStack() as cleanup:
        for name in (NEAR, FAR):
            subprocess.run(["ip", "netns", "add", name], check=True)
            cleanup.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        command = [*delay_command, NEAR, NEAR_IP, FAR, FAR_IP, str(delay_ms), "0"]
        link = cleanup.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        cleanup.callback(link.terminate)
        assert link.stdout is not None
        if not link.stdout.readline():
            raise RuntimeError(f"{shlex.join(command)} ended before its link was up")
        for name, address in ((NEAR, NEAR_IP), (FAR, FAR_IP)):
            _set_mtu(name, address, mtu)
        yield link.pid


def _set_mtu(namespace: str, address: str, mtu: int) -> None:
    shown = subprocess.run(
        ["ip", "-n", namespace, "-oneline", "addr", "show", "to", address], check=True, capture_output=True, text=True
    )
    device = shown.stdout.split()[1].partition("@")[0]
    subprocess.run(["ip", "-n", namespace, "link", "set", device, "mtu", str(mtu)], check=True)


def bare_seconds(workers: int, out: int, back: int, calls: int) -> list[float]:
    """What each of ``calls`` rounds takes in which NEAR asks ``workers`` sockets of FAR at once.

    ``out`` bytes go to each and ``back`` bytes come from each; nobody computes.
    """
    ends = [sys.executable, "-m", "bench.namespaces"]
    with ExitStack() as cleanup:
        ports = list[str]()
        for _ in range(workers):
            argv = [*inside(FAR), *ends, "listen", FAR_IP, str(out), str(back)]
            end = cleanup.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
            assert end.stdout is not None
            ports.append(end.stdout.readline().strip())
        argv = [*inside(NEAR), *ends, "ask", FAR_IP, ",".join(ports), str(out), str(back), str(calls)]
        asked = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    return [float(line) for line in asked.stdout.split()]


def _listen(address: str, out: int, back: int) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        link, _ = server.accept()
    content, buffer = bytes(back), memoryview(bytearray(out))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with link:
        while receive(link, buffer):
            link.sendall(content)


def _ask(address: str, ports: Sequence[int], out: int, back: int, calls: int) -> None:
    links = [socket.create_connection((address, port)) for port in ports]
    for link in links:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    content, buffer = bytes(out), memoryview(bytearray(back))
    for _ in range(calls):
        start = time.perf_counter()
        for link in links:
            link.sendall(content)
        for link in links:
            receive(link, buffer)
        print(time.perf_counter() - start)


if __name__ == "__main__":
    end, address, *numbers = sys.argv[1:]
    if end == "listen":
        _listen(address, *map(int, numbers))
    else:
        _ask(address, [int(port) for port in numbers[0].split(",")], *map(int, numbers[1:]))
