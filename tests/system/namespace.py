"""Network namespaces joined to this one by a link each, as other hosts are. Needs root and iproute2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Namespace:
    """One of them; ``theirs`` is its address as seen from here."""

    name: str
    theirs: str
    device: str  # its end of the link

    @property
    def inside(self) -> tuple[str, ...]:
        """The command that runs another one in it."""
        return ("ip", "netns", "exec", self.name)

    def unplug(self) -> None:
        """From now on packets are lost both ways, and nobody is told."""
        _run("ip", "-n", self.name, "link", "set", self.device, "down")

    def plug_in(self) -> None:
        _run("ip", "-n", self.name, "link", "set", self.device, "up")

    def peers(self) -> set[str]:
        """HOST:PORT of whoever has a TCP connection to here."""
        return _peers(_run(*self.inside, "ss", "-Htn", "state", "established", "src", self.theirs))

    def cut(self) -> set[str]:
        """End every TCP connection here, each with a reset to its peer; returns the peers that had one."""
        return _peers(_run(*self.inside, "ss", "-HKtn", "state", "established", "src", self.theirs))


def _peers(listed: str) -> set[str]:
    return {line.split()[-1] for line in listed.splitlines()}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def joined(number: int = 0) -> Iterator[Namespace]:
    """A namespace, the ``number``-th of this process (0 to 63)."""
    pid = os.getpid() % 10**6
    name, link, peer = f"consilium-{pid}-{number}", f"c{pid}-{number}a", f"c{pid}-{number}b"
    ours, theirs = (f"10.213.77.{4 * number + each}" for each in (1, 2))
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", peer, "netns", name)
        _run("ip", "addr", "add", f"{ours}/30", "dev", link)
        _run("ip", "link", "set", link, "up")
        _run("ip", "-n", name, "addr", "add", f"{theirs}/30", "dev", peer)
        _run("ip", "-n", name, "link", "set", peer, "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")
        yield Namespace(name, theirs, peer)
    finally:
        _run("ip", "netns", "del", name)
        subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)  # goes with it, but not at once
