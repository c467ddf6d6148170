"""What a process says while it runs: logs on standard error, and one line on standard output once it listens."""

from __future__ import annotations

import json
import logging
import sys

# Libraries whose information lines are about themselves, not about this deployment.
QUIET = ("asyncio", "httpx", "grpc")


def setup_logging(role: str, level: str = "info") -> None:
    """Log to standard error as ``TIME LEVEL ROLE MESSAGE``; ``level`` is debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {role.replace('%', '%%')} %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def announce(address: str, metrics: str | None = None) -> None:
    """Say on standard output that calls are accepted at ``address``; whoever started the process waits for this.

    ``metrics`` is the URL to scrape where it is a port of its own.
    """
    line = {"event": "listening", "address": address}
    print(json.dumps(line if metrics is None else {**line, "metrics": metrics}), flush=True)
