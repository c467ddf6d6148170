"""What GPUs do: every section checks its bits first, prints its tables, and leaves one JSON file in bench/results/gpu.

`python -m bench.gpu` needs a GPU, and downloads and builds nothing. Sections run one after the other, each in a process
of its own: what one leaves in memory, or breaks, concerns no other. `--toy` runs all of it at tiny sizes on the CPU, in
Triton's interpreter, whose times mean nothing: it shows that the script works before a GPU is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console

SECTIONS = {
    "experts": "bench.gpu_experts",
    "worker": "bench.gpu_worker",
    "hop": "bench.gpu_hop",
    "decode": "bench.gpu_decode",
}  # in the order in which they run


class Section(Protocol):
    """A module."""

    def run(self, toy: bool, console: Console) -> dict[str, Any]:
        """Measure, print tables, return the figures. Raises RuntimeError where a bit is wrong."""
        ...


def run_section(name: str, toy: bool) -> None:
    """In this process; the interpreter is chosen before any kernel is defined."""
    if toy:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from bench.machine import describe
    from bench.report import write

    machine = describe() | {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    section: Section = importlib.import_module(SECTIONS[name])
    with torch.inference_mode():
        figures = section.run(toy, Console(width=130))
    if not toy:
        print(f"written to {write(f'gpu/{name}', machine, {}, figures)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a section failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, in Triton's interpreter")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if options.here:
        for name in options.sections:
            run_section(name, options.toy)
        return 0
    failed = []
    for name in options.sections or SECTIONS:
        started = time.monotonic()
        argv = [sys.executable, "-m", "bench.gpu", "--here", name, *(["--toy"] if options.toy else [])]
        status = subprocess.run(argv, check=False).returncode
        print(
            f"{name}: {'done' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - started:.0f} s", flush=True
        )
        failed += [name] if status else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
