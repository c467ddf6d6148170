"""`consilium version`."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from consilium import __version__


def show(_: argparse.Namespace) -> int:
    """Print the versions that a bug report should name; torch is not imported for that."""
    print(f"consilium {__version__}")
    print(f"python {platform.python_version()}")
    print(f"torch {metadata.version('torch')}")
    return 0
