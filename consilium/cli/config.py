"""`consilium config show|schema|check`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from consilium.config import Config, load_config


def show(options: argparse.Namespace) -> int:
    """Print the merged configuration as YAML. Secrets are hidden by their type. Raises ConfigError."""
    config = load_config(_file(options))
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
    return 0


def schema(_: argparse.Namespace) -> int:
    """Print the JSON Schema of the configuration file."""
    print(json.dumps(Config.model_json_schema(), indent=2))
    return 0


def check(options: argparse.Namespace) -> int:
    """Say that the configuration can be used. Raises ConfigError that says why not."""
    load_config(_file(options))
    print(f"ok: {options.config or 'environment and defaults'}")
    return 0


def _file(options: argparse.Namespace) -> Path | None:
    return Path(options.config) if options.config else None
