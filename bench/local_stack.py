"""A stack of its own for a benchmark: `consilium up` as a child process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

READY = re.compile(r" is ready at (http://\S+)/v1$")
STOP_SECONDS = 60.0


@contextmanager
def consilium_up(model: str, arguments: Sequence[str] = ()) -> Iterator[str]:
    """The URL of a fresh stack, which is stopped at the end. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "consilium", "up", "--model", model, "--port", "0", "--no-demo", *arguments]
    environment = {"CONSILIUM_LOG__LEVEL": "warning", **os.environ}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield _wait_ready(process.stdout)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _wait_ready(output: IO[str]) -> str:
    """The URL that `consilium up` prints once it is ready; it ends by itself when that takes too long."""
    for line in output:
        if match := READY.search(line.rstrip()):
            return match[1]
    raise RuntimeError("`consilium up` ended before it was ready; its log above says why")
