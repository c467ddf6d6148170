"""What GPUs do: every section checks its bits first, prints its tables, and leaves one JSON file in bench/results/gpu.

`python -m bench.gpu` needs a GPU, and downloads and builds nothing. Sections run one after the other, each in processes
of its own: what one leaves in memory, or breaks, concerns no other. One that takes too long is ended, and says where it
was; what it had found by then is in its file. `--toy` runs all of it at tiny sizes on the CPU, in Triton's interpreter,
whose times mean nothing: it shows that the script works before a GPU is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from bench.machine import describe, describe_gpus
from bench.report import write
from consilium import mps
from consilium.errors import ConfigError

ENDING_SECONDS = 10.0  # for a process to say where it is
LEAST_SECONDS = 20.0  # in which a section can find anything


@dataclass(frozen=True, slots=True)
class Section:
    """What runs: a function of a module, ``(toy, console, keep)``, which raises where a bit is wrong."""

    module: str
    seconds: float  # that it may take; it is made to take half of that
    shared: bool = False  # several of its processes use the GPU at once: under MPS
    function: str = "run"

    def measure(self, toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
        """Import it and run it; ``keep`` is given figures, by name, as they are found."""
        with torch.inference_mode():
            getattr(importlib.import_module(self.module), self.function)(toy, console, keep)


SECTIONS = {  # in the order in which they run
    "experts": Section("bench.gpu_experts", 300),
    "layer": Section("bench.gpu_layer", 300),
    "hop": Section("bench.gpu_hop", 240, shared=True),
    "decode": Section("bench.gpu_decode", 300),
    "stack": Section("bench.gpu_stack", 300, shared=True),
    "worker": Section("bench.gpu_worker", 180, shared=True),
    "turns": Section("bench.gpu_hop", 150, function="run_in_turns"),
    "kill": Section("bench.gpu_hop", 120, shared=True, function="run_kill"),  # last: MPS may not survive it
}


def run_section(name: str, toy: bool) -> None:
    """In this process; the interpreter is chosen before any kernel is defined."""
    if toy:
        os.environ["TRITON_INTERPRET"] = "1"
    machine = describe() | {"gpus": describe_gpus(), "mps": mps.is_serving()}
    started, figures, console = time.monotonic(), dict[str, Any](), Console(width=130, log_path=False)

    def keep(found: Mapping[str, Any]) -> None:
        figures.update(found)
        if not toy:
            parameters = {"seconds": time.monotonic() - started, "gpus_then": describe_gpus()}
            write(f"gpu/{name}", machine, parameters, figures)

    try:
        SECTIONS[name].measure(toy, console, keep)
    except Exception as error:
        keep({"failed": f"{type(error).__name__}: {error}"})
        raise


def run_apart(argv: Sequence[str], seconds: float, environ: Mapping[str, str]) -> int | None:
    """Its exit status; None where it took longer: then all its processes have said where they were, and are ended."""
    spoken = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(argv, env={**os.environ, **spoken, **environ}, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # Python's fault handler prints the stack of every thread
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whoever is left of it
        process.wait()


@contextmanager
def sharing(section: Section, toy: bool) -> Iterator[Mapping[str, str]]:
    """Variables for its processes; MPS serves them where they share a GPU."""
    with contextlib.ExitStack() as stack:
        environ: Mapping[str, str] = {}
        if section.shared and not toy and not mps.is_serving():
            try:
                environ = stack.enter_context(mps.running())
            except ConfigError as error:
                print(f"without MPS: {error.message}", flush=True)
        yield environ


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a section failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--within", type=float, metavar="SECONDS", default=math.inf, help="for all of them")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.here:
        for name in options.sections:
            run_section(name, options.toy)
        return 0
    end = time.monotonic() + options.within
    failed = [name for name in options.sections or SECTIONS if not _succeeds(name, options.toy, end)]
    print(f"failed: {', '.join(failed)}" if failed else "all sections are done", flush=True)
    return 1 if failed else 0


def _succeeds(name: str, toy: bool, end: float) -> bool:
    """``end`` is when no section may run any more, on time.monotonic's clock."""
    started, section = time.monotonic(), SECTIONS[name]
    seconds = min(section.seconds, end - started - ENDING_SECONDS)
    if seconds < LEAST_SECONDS:
        print(f"== {name}: not begun, there is no time for it", flush=True)
        return False
    print(f"== {name}: at most {seconds:.0f} s, from {time.strftime('%H:%M:%S')} on", flush=True)
    argv = [sys.executable, "-m", "bench.gpu", "--here", name, *(["--toy"] if toy else [])]
    with sharing(section, toy) as environ:
        status = run_apart(argv, seconds, environ)
    outcome = {0: "done", None: "ENDED, it took too long"}.get(status, f"FAILED ({status})")
    print(f"== {name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
