"""What a gateway takes of memory beside what its experts take: stacks on checkpoints that differ only in their number.

`python -m bench.memory` prints a table and writes bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.report import write
from tests.memory import stack_memory
from tests.random_checkpoint import save_random_mixtral
from tests.stack import stack


def measure(experts: int, quantization: str) -> dict[str, Any]:
    """Bytes of one stack's experts on disk and of its processes in memory."""
    with tempfile.TemporaryDirectory() as folder:
        on_disk = save_random_mixtral(Path(folder) / "model", experts)
        with stack(Path(folder) / "model", workers=2, quantization=quantization) as served:
            return {"experts": experts, "expert_bytes_on_disk": on_disk, **stack_memory(served)}


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 12, 40], metavar="E", help="in each of 4 layers")
    parser.add_argument("--quantization", choices=("none", "int8"), default="int8")
    options = parser.parse_args()
    machine = describe()
    figures = [measure(experts, options.quantization) for experts in options.experts]
    table = Table("experts", "on disk", "HTTP process", "engine", "workers", caption="MiB resident")
    for each in figures:
        sizes = [f"{each[part] / 2**20:.0f}" for part in ("expert_bytes_on_disk", "http", "engine", "workers")]
        table.add_row(str(each["experts"]), *sizes)
    Console().print(table)
    print(f"written to {write('memory', machine, vars(options), figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
