"""How many cores this process may really use: fewer than the machine has, in a container or under taskset."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"


def usable_cores(quota_file: Path = _QUOTA) -> int:
    """Cores by CPU affinity and by the container's CPU quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):  # no container, or not a Linux that states quotas this way
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
