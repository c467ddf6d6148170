"""`consilium doctor`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from consilium.config import Config, load_config, split_endpoint
from consilium.errors import ConfigError
from consilium.model_folder import ModelFolder, read_model_folder
from consilium.models import resolve_model

if TYPE_CHECKING:
    from consilium.doctor.examine import Findings

MS = 1e3


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's flags."""
    parser = commands.add_parser(
        "doctor",
        help="measure the way to every worker and its experts, and say whether splitting pays",
        description="Asks every worker what it is, times small and large calls and single experts over gRPC, and says "
        "in plain words whether splitting pays here and what limits it. Best without other load. Ends with status 1 "
        "when a worker cannot be reached or does not fit the others.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration; its `experts:` are asked")
    parser.add_argument(
        "--endpoint", action="append", metavar="grpc://HOST:PORT", help="a worker to ask instead; may be repeated"
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="what they serve (the configuration's, with --config)")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="experts of a token, where no model is named")
    parser.add_argument("--calls", type=_positive, default=50, metavar="N", help="small calls to each worker (50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.set_defaults(command=doctor)


def doctor(options: argparse.Namespace) -> int:
    """1 when something is wrong. Raises ConfigError and CheckpointError when it cannot begin."""
    from consilium.doctor.examine import examine  # torch and gRPC take a second to import

    config = load_config(Path(options.config) if options.config else None)
    endpoints, model = _endpoints(options, config), _model(options, config)
    console = Console(stderr=True)
    with console.status("asking") as status:
        findings = examine(endpoints, model, options.top_k, options.calls, status.update)
    if options.json:
        print(json.dumps(findings.to_json(), indent=2))
    else:
        _print(findings)
    return 1 if findings.problems else 0


def _endpoints(options: argparse.Namespace, config: Config) -> list[str]:
    endpoints = options.endpoint or [each for group in config.experts.values() for each in group.endpoints]
    if not endpoints:
        raise ConfigError("there is no worker to ask; name one with --endpoint grpc://HOST:PORT, or give --config FILE")
    for each in endpoints:
        try:
            split_endpoint(each)
        except ValueError as error:
            raise ConfigError(f"--endpoint: {error}") from None
    return list(dict.fromkeys(endpoints))


def _model(options: argparse.Namespace, config: Config) -> ModelFolder | None:
    name = options.model or (config.model if options.config else None)
    return read_model_folder(resolve_model(name)) if name else None


def _print(findings: Findings) -> None:
    console = Console()
    if findings.timings:
        table = Table(
            box=box.SIMPLE_HEAD, caption="ms, medians; round trip: a call without rows", caption_justify="left"
        )
        for heading in ("worker", "experts", "round trip", "MB/s", "expert, 1 row", "32 rows"):
            table.add_column(heading, justify="left" if heading == "worker" else "right", no_wrap=True)
        for address, each in findings.timings.items():
            rate = f"{1e-6 / each.seconds_per_byte:.0f}" if each.seconds_per_byte else "-"
            times = [f"{seconds * MS:.2f}" for seconds in (each.round_trip, each.few, each.many)]
            table.add_row(address, str(findings.experts[address]), times[0], rate, *times[1:])
        console.print(table)
    for sentence in findings.verdict:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for address, problem in findings.problems.items():
        console.print(f"{address}: {problem}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number
