"""`python -m bench.peers`: llama.cpp, transformers and hivemind on this machine, each alone or one after the other.

Run it in the same session as the figure that it is compared with: machines, neighbours and clocks differ by more than
peers do. The first run builds llama.cpp and writes random weights (7.4 GB for OLMoE's shape) into the user's cache.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from rich.console import Console

from bench.machine import describe
from bench.peers.figures import Figure, Plan, merge, table
from bench.report import write
from consilium.errors import ConsiliumError
from consilium.models import cache_folder

MODELS = {"llama.cpp": ("olmoe-1b-7b", "default"), "transformers": ("default",), "hivemind": ("one expert",)}
MODULES = {
    "llama.cpp": "bench.peers.llama_cpp",
    "transformers": "bench.peers.hf_transformers",
    "hivemind": "bench.peers.hivemind_expert",
}
Measure = Callable[[str, Plan, Path], Iterator[Figure]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 1 when a peer could not be measured; the figures of the others are written all the same."""
    options = _parse(arguments)
    batches = tuple(options.batch)
    plan = Plan(options.threads, options.repeats, batches, options.context, options.tokens, options.prompt)
    machine, console = describe(), Console(stderr=True)
    figures, missing = list[Figure](), dict[str, str]()
    for peer in options.only or MODELS:
        for model in MODELS[peer]:
            if options.model and model not in options.model:
                continue
            try:
                figures += _find(peer)(model, plan, options.folder)
            except (RuntimeError, ConsiliumError, OSError, subprocess.CalledProcessError) as error:
                missing[peer] = str(error)
                console.print(f"{peer}: {error}", style="bold red", markup=False)
    merged = merge(figures)
    Console(width=110).print(table(merged))
    parameters = {name: value for name, value in vars(options).items() if name != "folder"}
    content = {"measured": [each.to_json() for each in merged], "missing": missing}
    console.print(f"written to {write(options.name, machine, parameters, content)}")
    return 1 if missing else 0


def _find(peer: str) -> Measure:
    """Its module's `measure`, imported only when asked for: what the others need is not."""
    measure: Measure = import_module(MODULES[peer]).measure
    return measure


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    models = sorted({model for each in MODELS.values() for model in each})
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), metavar="PEER", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--model", nargs="+", choices=models, metavar="MODEL", help=f"of {', '.join(models)}")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the median of them is reported; 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="sequences at once; 1 16")
    parser.add_argument("--context", type=int, default=64, metavar="N", help="prompt tokens before decode; 64")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="decoded by each sequence; 32")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prefill; 512")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "bench", metavar="DIR", help="keeps 8 GB")
    parser.add_argument("--name", default="peers", help="of the result, bench/results/NAME.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
