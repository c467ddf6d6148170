"""Child processes of `consilium up`, with small programs in the place of the services."""

from __future__ import annotations

import os
import queue
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from consilium.supervisor import Child, Ended, Listening, StopAsked, next_event, stop

LISTEN = """print('{"event": "listening", "address": "grpc://127.0.0.1:1"}', flush=True)\n"""
WAIT = "import signal\nsignal.pause()\n"
IGNORE = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


class Nursery:
    """Children that run Python programs; none outlives the test."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.lines: list[str] = []
        self.children: list[Child] = []

    def start(self, program: str, environ: dict[str, str] | None = None) -> Child:
        command = [sys.executable, "-c", program]
        child = Child(f"worker-{len(self.children)}", command, environ or {}, self.events, self.lines.append)
        self.children.append(child)
        return child


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    for child in nursery.children:
        if child.running:
            child.kill()


def test_a_child_tells_its_address_and_its_log_is_forwarded(nursery: Nursery) -> None:
    child = nursery.start("import os\nprint('hello ' + os.environ['NAME'])\n" + LISTEN + WAIT, {"NAME": "Ann"})
    assert next_event(nursery.events, None) == Listening(child, "grpc://127.0.0.1:1")
    assert nursery.lines == ["hello Ann"]
    assert child.running


def test_a_child_that_dies_is_told_with_its_last_lines(nursery: Nursery) -> None:
    child = nursery.start("import sys\nfor n in range(99): print('line', n, file=sys.stderr)\nsys.exit(3)")
    assert next_event(nursery.events, None) == Ended(child, 3)
    message = child.died(3, "at start").message
    assert message.startswith("worker-0 ended with exit status 3 at start. Its last lines:\n  line 79\n")
    assert message.endswith("\n  line 98")
    killed = nursery.start(WAIT)
    killed.kill()
    event = next_event(nursery.events, None)
    assert event == Ended(killed, -signal.SIGKILL)
    assert "was killed by SIGKILL" in killed.died(-signal.SIGKILL, "at start").message


def test_what_a_child_leaves_behind_goes_with_it(nursery: Nursery) -> None:
    program = "import subprocess, sys\nprint(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True)\n"
    program = program.replace("sys.argv[1]", repr(LISTEN + WAIT))
    child = nursery.start(program)
    listening = next_event(nursery.events, None)
    assert isinstance(listening, Listening)
    watched = os.pidfd_open(int(nursery.lines[0]))
    assert next_event(nursery.events, None) == Ended(child, 0)
    assert select.select([watched], [], [], 30)[0], "the child's own child is still there"
    os.close(watched)


def test_stop_waits_for_those_that_finish_and_kills_those_that_do_not(nursery: Nursery) -> None:
    farewell = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('farewell'))\n"
    polite = nursery.start(farewell + LISTEN + WAIT)
    next_event(nursery.events, None)
    stubborn = nursery.start(IGNORE + LISTEN + "while True: signal.pause()\n")
    next_event(nursery.events, None)
    assert stop([polite], nursery.events, grace=60) is False
    assert nursery.lines == ["farewell"]
    assert stop([polite, stubborn], nursery.events, grace=0) is False
    assert not polite.running
    assert not stubborn.running


def test_a_second_request_to_stop_does_not_wait(nursery: Nursery) -> None:
    stubborn = nursery.start(IGNORE + LISTEN + "while True: signal.pause()\n")
    next_event(nursery.events, None)
    nursery.events.put(StopAsked())
    assert stop([stubborn], nursery.events, grace=3600) is True
    assert not stubborn.running


def test_a_tethered_program_ends_with_its_parent() -> None:
    tethered = [sys.executable, "-m", "consilium.tether"]
    parent = (
        "import os, subprocess, sys, signal\n"
        f"command = {tethered} + [str(os.getpid()), sys.executable, '-c', {LISTEN + WAIT!r}]\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watched = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
    assert select.select([watched], [], [], 30)[0], "the tethered program outlived its parent"
    os.close(watched)


def test_a_program_whose_parent_is_gone_does_not_start() -> None:
    command = [sys.executable, "-m", "consilium.tether", "1", sys.executable, "-c", "print('started')"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert "has ended" in finished.stderr
