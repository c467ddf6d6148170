"""The `consilium` command."""

from consilium.cli.main import main

__all__ = ["main"]
