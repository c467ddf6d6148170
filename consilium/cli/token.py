"""`consilium token`: secrets for workers and gateways."""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from consilium.errors import ConfigError

BYTES = 32  # of chance in a secret


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Its flags."""
    parser = commands.add_parser(
        "token",
        help="write a random secret into a file, for workers or for gateways",
        description="Writes a random secret into each FILE that is not there yet, for its owner alone to read. A "
        "deployment whose services listen beyond this machine needs two: one for workers, one for gateways.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="where to write it")
    parser.set_defaults(command=write)


def write(options: argparse.Namespace) -> int:
    """Exit status 0. Raises ConfigError when a file cannot be written."""
    for file in options.files:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            print(f"{file} is there already")
            continue
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from None
        with os.fdopen(descriptor, "w") as opened:
            opened.write(secrets.token_hex(BYTES) + "\n")
        print(f"a secret was written to {file}")
    return 0
