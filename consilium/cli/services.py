"""`consilium gateway`, `expert`, `router`, `eval`, `doctor` and their like: programs of their own, found by name.

The shared kernel imports no service, so they are run as `python -m` would run them.
"""

from __future__ import annotations

import importlib.util
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from consilium.errors import ConfigError

SERVICES = {
    "gateway": "run the gateway: HTTP, scheduling, attention, gating",
    "expert": "run one expert worker",
    "router": "run the router, which decides which worker holds which experts",
    "eval": "say what each quantization costs in accuracy, on a text",
    "doctor": "measure the way to every worker and its experts, and say whether splitting pays",
    "bench": "measure this machine: layer, rpc, serve, peers, … (in a checkout of the source)",
    "prune": "write a copy of a model without its least used experts",
    "train": "turn a dense model into a trained Mixture of Experts",
}
# The program of each service; `consilium up` starts the same ones.
MODULES = {
    "gateway": "gateway",
    "expert": "expert_service",
    "router": "router_service",
    "eval": "gateway.evaluate",
    "doctor": "gateway.doctor",
    "prune": "gateway.prune",
    "train": "training",
}


# `consilium bench NAME`: the others have the name of their module.
BENCHES = {"layer": "expert_layer"}


def run(service: str, arguments: Sequence[str]) -> int:
    """Run the service in this process, with ``arguments`` as its command line, until it ends.

    SIGTERM ends it also while it still loads: as the first process of a container it would get no signal that it has
    no handler for. Once it listens it has handlers of its own.
    """
    signal.signal(signal.SIGTERM, _leave)
    if service == "bench":
        return _bench(arguments)
    sys.argv = [f"consilium {service}", *arguments]
    runpy.run_module(MODULES[service], run_name="__main__", alter_sys=False)
    return 0


def _bench(arguments: Sequence[str]) -> int:
    """Raises ConfigError for a benchmark that is not there."""
    name = arguments[0] if arguments else ""
    module = f"bench.{BENCHES.get(name, name)}"
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        found = name.isidentifier() and importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        raise ConfigError("bench: the benchmarks are not installed; run this in a checkout of the source") from None
    if not found:
        raise ConfigError(f"bench: there is no benchmark {name!r}; try layer, rpc, serve, peers, kernels or memory")
    sys.argv = [f"consilium bench {name}", *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
    return 0


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
