"""Logs: one line an event on standard error, in the same form from every process."""

from __future__ import annotations

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
