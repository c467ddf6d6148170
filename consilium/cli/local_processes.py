"""The processes of one `consilium up`: started, listened to, and stopped in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from consilium.config import Config
from consilium.errors import DeadlineExceeded
from consilium.local_stack import thread_environment
from consilium.supervisor import Child, Ended, Listening, StopAsked, next_event, stop

_GATEWAY_COLOUR = "green"
_CACHE_COLOUR = "white"
_ROUTER_COLOUR = "bright_black"
_WORKER_COLOURS = ("cyan", "magenta", "yellow", "blue", "red")
# Beyond the time that a process is allowed for what it has accepted.
_GRACE_SECONDS = 5.0


class StoppedAtStart(Exception):
    """Someone asked to stop before everything was ready."""


@dataclass(slots=True)
class LocalProcesses:
    """A gateway, its workers, perhaps a router and a cache, and the one queue of what happens to them."""

    config: Config
    shared: list[str]  # arguments that workers and gateway have in common
    cores: int
    deadline: float  # monotonic; everything must be ready by then
    events: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    console: Console = field(default_factory=lambda: Console(stderr=True))
    workers: list[Child] = field(default_factory=list)
    gateway: Child | None = None
    cache: Child | None = None
    router: Child | None = None
    closing: threading.Event = field(default_factory=threading.Event)
    environ: dict[str, str] = field(default_factory=dict)  # for all of them
    not_ready: str = "the processes are starting"

    def start_worker(self, name: str, command: Sequence[str], threads: int) -> None:
        """Start a worker, and do not wait for it."""
        colour = _WORKER_COLOURS[len(self.workers) % len(_WORKER_COLOURS)]
        self.workers.append(self._start(name, command, threads, colour))

    def start_gateway(self, command: Sequence[str], threads: int) -> None:
        """Start the gateway, and do not wait for it."""
        self.gateway = self._start("gateway", command, threads, _GATEWAY_COLOUR)

    def start_cache(self, command: Sequence[str]) -> None:
        """Start the cache's server. Nobody waits for it: without it the gateway computes what it does not find."""
        self.cache = self._start("cache", command, 1, _CACHE_COLOUR)

    def start_router(self, command: Sequence[str]) -> str:
        """Start the router, and return its address once it listens."""
        self.router = self._start("router", command, 1, _ROUTER_COLOUR)
        event = self.event_at_start()
        while not isinstance(event, Listening):
            event = self.event_at_start()
        return event.address

    def event_at_start(self) -> object:
        """The next event. Raises ChildDied, DeadlineExceeded, and StoppedAtStart."""
        event = next_event(self.events, self.deadline)
        if isinstance(event, Ended):
            raise event.child.died(event.status, "before everything was ready")
        if isinstance(event, StopAsked):
            raise StoppedAtStart
        if event is None:
            raise DeadlineExceeded(f"not ready in time (--start-timeout): {self.not_ready}")
        return event

    def stop(self) -> None:
        """The gateway first, so that what it has accepted finds its workers; then the workers, then the rest."""
        self.closing.set()
        gateway = [] if self.gateway is None else [self.gateway]
        if any(child.running for child in (*gateway, *self.workers)):
            self.console.print("stopping (Ctrl-C again does not wait for running requests)")
        hurried = stop(gateway, self.events, self.config.gateway.drain_timeout + _GRACE_SECONDS)
        stop(self.workers, self.events, 0.0 if hurried else self.config.worker.drain_timeout + _GRACE_SECONDS)
        rest = [child for child in (self.router, self.cache) if child is not None]
        stop(rest, self.events, 0.0 if hurried else _GRACE_SECONDS)

    def _start(self, name: str, command: Sequence[str], threads: int, colour: str) -> Child:
        def show(line: str) -> None:
            self.console.print(Text.assemble((f"{name:<9}│ ", colour), line), soft_wrap=True)

        environ = thread_environment(threads) | self.environ
        if name == "gateway" and self.config.cache is not None and self.config.cache.redis is not None:
            # Not on the command line, which everyone on the machine can read: the URL may hold a password.
            environ["CONSILIUM_CACHE__REDIS"] = self.config.cache.redis.get_secret_value()
        return Child(name, command, environ, self.events, show)
