"""Child processes of one command: started together, their logs forwarded, none left behind.

Threads read the children's pipes and wait for their ends; whatever happens becomes an event in one queue, which the
main thread reads. Children are tied to this process (see tether) and have sessions of their own, so that Ctrl-C in a
terminal reaches this process alone, which then stops them in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from consilium.errors import ConsiliumError

TAIL_LINES = 20
# How long to wait for the pipes of a child that has ended: a child of its own may still hold them.
_PIPES_TIMEOUT = 5.0


class ChildDied(ConsiliumError):
    """A child process ended when it should have been running; the text has its last lines."""


@dataclass(frozen=True, slots=True)
class Listening:
    """The child takes calls at ``address``."""

    child: Child
    address: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The child has ended; ``status`` is its exit status, negative for the signal that killed it."""

    child: Child
    status: int


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Someone pressed Ctrl-C or sent SIGTERM."""


class Child:
    """One running process. ``show`` gets every line that it logs."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        events: queue.SimpleQueue[object],
        show: Callable[[str], None],
    ) -> None:
        self.name = name
        self._events = events
        self._show = show
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        tethered = [sys.executable, "-m", "consilium.tether", str(os.getpid()), *command]
        self._process = subprocess.Popen(
            tethered,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._readers = [
            threading.Thread(target=target, name=f"{name}-pipe", daemon=True)
            for target in (self._read_stdout, self._read_stderr)
        ]
        for thread in (*self._readers, threading.Thread(target=self._wait, name=f"{name}-wait", daemon=True)):
            thread.start()

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Ask the process to finish what it has accepted and leave."""
        if self.running:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process, and those that it has started, at once."""
        # Its group is gone when it has just ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def died(self, status: int, when: str) -> ChildDied:
        """The error that says how the process ended, with its last lines."""
        lines = "".join(f"\n  {line}" for line in self._tail) or " It wrote nothing."
        return ChildDied(f"{self.name} {_how_it_ended(status)} {when}. Its last lines:{lines}")

    def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            address = _listening_address(line)
            if address is not None:
                self._events.put(Listening(self, address))
            else:
                self._log(line)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._log(line)

    def _log(self, line: str) -> None:
        self._tail.append(line.rstrip())
        self._show(line.rstrip())

    def _wait(self) -> None:
        status = self._process.wait()
        deadline = time.monotonic() + _PIPES_TIMEOUT
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        if any(reader.is_alive() for reader in self._readers):  # a child of the child has outlived it
            self.kill()
        self._events.put(Ended(self, status))


def next_event(events: queue.SimpleQueue[object], deadline: float | None) -> object | None:
    """The next event, or None once the monotonic clock is past ``deadline``; None waits for ever."""
    try:
        return events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        return None


def stop(children: Sequence[Child], events: queue.SimpleQueue[object], grace: float) -> bool:
    """Stop the children and wait for their ends; those still there after ``grace`` seconds are killed.

    A StopAsked kills them at once; returns whether there was one.
    """
    left = {child for child in children if child.running}
    for child in left:
        child.terminate()
    deadline: float | None = time.monotonic() + grace
    hurried = False
    while left:
        event = next_event(events, deadline)
        if isinstance(event, Ended):
            left.discard(event.child)
        elif event is None or isinstance(event, StopAsked):
            hurried = hurried or event is not None
            for child in left:
                child.kill()
            deadline = None  # what is killed does end
    return hurried


def _listening_address(line: str) -> str | None:
    """The address in a service's announcement, or None where the line is something else."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    if not isinstance(message, dict) or message.get("event") != "listening":
        return None
    return str(message["address"])


def _how_it_ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
