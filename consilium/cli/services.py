"""`consilium gateway` and `consilium expert`: the services' own programs, found by name.

The shared kernel imports no service, so they are run as `python -m` would run them.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

SERVICES = {
    "gateway": "run the gateway: HTTP, scheduling, attention, gating",
    "expert": "run one expert worker",
}
# The program of each service; `consilium up` starts the same ones.
MODULES = {"gateway": "gateway", "expert": "expert_service"}


def run(service: str, arguments: Sequence[str]) -> int:
    """Run the service in this process, with ``arguments`` as its command line, until it ends."""
    sys.argv = [f"consilium {service}", *arguments]
    runpy.run_module(MODULES[service], run_name="__main__", alter_sys=False)
    return 0
