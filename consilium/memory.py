"""How much memory this process may really use: less than the machine has, in a container. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes, or "max"


def usable_memory(limit_file: Path = _LIMIT) -> int:
    """Bytes of the machine, or of the container where it has fewer."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = limit_file.read_text().strip()
    except OSError:  # no container, or not a Linux that states limits this way
        return memory
    return min(memory, int(limit)) if limit.isdecimal() else memory
