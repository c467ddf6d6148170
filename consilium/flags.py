"""The command line of a service: `--config`, and flags that set keys of the configuration."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path


def service_parser(program: str, description: str, flags: Mapping[str, tuple[str, str]]) -> argparse.ArgumentParser:
    """``flags`` has for each flag the dotted key that it sets, under which it is parsed, and its help."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the deployment")
    for flag, (key, text) in flags.items():
        parser.add_argument(f"--{flag}", dest=key, help=text)
    return parser
