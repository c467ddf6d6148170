"""What the processes of a stack take of memory, as the kernel counts it."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from tests.stack import Stack


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, the pages of mapped files that it touched included."""
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None, f"process {pid} has ended"
    return int(match[1]) * 1024


def children(pid: int) -> list[int]:
    """The process ids of a process's children, whichever thread started them."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for each in lists for child in each.read_text().split()]


def stack_memory(served: Stack) -> dict[str, int]:
    """Resident bytes of the HTTP process, the engine and all workers, once every layer has routed some tokens."""
    body = {"prompt": list(range(4, 100)), "max_tokens": 4, "ignore_eos": True}
    response = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    (engine,) = children(served.gateway.pid)
    return {
        "http": resident_bytes(served.gateway.pid),
        "engine": resident_bytes(engine),
        "workers": sum(resident_bytes(worker.pid) for worker in served.workers),
    }
