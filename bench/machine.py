"""What a figure depends on beside the code under test: the machine, the versions, the revision."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PACKAGES = ("torch", "triton", "grpcio", "numpy", "fastapi", "uvicorn", "httpx")


def describe() -> dict[str, Any]:
    """The machine (without its name), the versions and the revision, as JSON holds them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _first(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo")) or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),  # figures taken beside other work say little
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "revision": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
    }


def describe_gpus() -> list[dict[str, str]]:
    """What the driver says of each GPU now, the clocks among it; nothing where there is no GPU."""
    asked = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "memory.used")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(asked, line.split(", "), strict=False)) for line in said.splitlines()]


def cpu_seconds(pid: int) -> float:
    """In user code and in the system, of a process and its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(fields[11]) + int(fields[12])) / TICKS + sum(cpu_seconds(int(child)) for child in children)


def _first(pattern: str, file: Path) -> str | None:
    match = re.search(pattern, file.read_text(), re.MULTILINE) if file.is_file() else None
    return match[1].strip() if match else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of this checkout; nothing where there is no git or no checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
