"""`consilium gateway`, `expert`, `eval` and `doctor`: the services' own programs, found by name.

The shared kernel imports no service, so they are run as `python -m` would run them.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Sequence
from types import FrameType

SERVICES = {
    "gateway": "run the gateway: HTTP, scheduling, attention, gating",
    "expert": "run one expert worker",
    "eval": "say what each quantization costs in accuracy, on a text",
    "doctor": "measure the way to every worker and its experts, and say whether splitting pays",
}
# The program of each service; `consilium up` starts the same ones.
MODULES = {"gateway": "gateway", "expert": "expert_service", "eval": "gateway.evaluate", "doctor": "gateway.doctor"}


def run(service: str, arguments: Sequence[str]) -> int:
    """Run the service in this process, with ``arguments`` as its command line, until it ends.

    SIGTERM ends it also while it still loads: as the first process of a container it would get no signal that it has
    no handler for. Once it listens it has handlers of its own.
    """
    signal.signal(signal.SIGTERM, _leave)
    sys.argv = [f"consilium {service}", *arguments]
    runpy.run_module(MODULES[service], run_name="__main__", alter_sys=False)
    return 0


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
