"""hivemind's remote expert: one call of an expert that computes nothing, which is what the way costs.

hivemind needs versions of packages that may not be ours, so it gets an environment of its own, which sees this one's
torch. It leaves daemons and workers behind when it fails: it runs in a process group that is killed at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from bench.machine import ROOT
from bench.peers.figures import Figure, Plan

VERSION = "1.1.12"
NAME = f"hivemind {VERSION}"
SECONDS = 300.0

console = Console(stderr=True)


def measure(model: str, plan: Plan, folder: Path) -> Iterator[Figure]:
    """The median round trip of each size. Raises RuntimeError with hivemind's last words when it fails."""
    python = _environment(folder)
    console.print(f"{NAME}: {plan.repeats} repeats")
    command: list[str | Path] = [python, "-m", "bench.peers.hivemind_call", str(plan.repeats)]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, log = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{NAME} did not end in {SECONDS:g} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        raise RuntimeError(f"{NAME} failed: {log[-2000:]}")
    for line in output.splitlines():
        call = json.loads(line)
        yield Figure(NAME, model, "round trip", call["rows"], [call["p50"] * 1e3], "ms")


def _environment(folder: Path) -> Path:
    """The interpreter of hivemind's environment, made once. Raises CalledProcessError when it cannot be installed."""
    place = folder / f"hivemind-{VERSION}"
    python, done = place / "bin" / "python", place / "installed"
    if not done.is_file():
        console.print(f"installing {NAME} into an environment of its own")
        venv.create(place, with_pip=True, clear=True)
        packages = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(packages.strip()) / "torch_of_consilium.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-qq", f"hivemind=={VERSION}"], check=True)
        done.touch()
    return python
