"""`python -m gateway.doctor` and `consilium doctor`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from consilium.config import Config, load_config, split_endpoint
from consilium.errors import ConfigError, ConsiliumError
from consilium.model_folder import ModelFolder, read_model_folder
from consilium.models import resolve_model
from consilium.tokens import GATEWAY, metadata_of
from gateway.doctor.examine import Findings, examine

MS = 1e3
INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """1 when a worker cannot be reached or does not fit, or when there is nothing to ask."""
    try:
        options = parse_arguments(argv)
        config = load_config(options.config, overrides={"tokens.gateway_file": options.token_file})
        endpoints, model = _endpoints(options, config), _model(options, config)
        with _gateway_silent(), Console(stderr=True).status("asking") as status:
            links = config.gateway.local_links and not options.grpc
            shown = metadata_of(config.tokens, GATEWAY)
            findings = examine(endpoints, model, options.top_k, options.calls, links, status.update, shown)
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    if options.json:
        print(json.dumps(findings.to_json(), indent=2))
    else:
        _print(findings)
    return 1 if findings.problems else 0


@contextmanager
def _gateway_silent() -> Iterator[None]:
    """What goes wrong is among the findings, and not in the log beside them."""
    log = logging.getLogger("gateway")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "consilium doctor",
        description="Asks every worker what it is, times small and large calls and single experts over the connection "
        "that a gateway here would have, and says in plain words whether splitting pays and what limits it. Best "
        "without other load. Ends with status 1 when a worker cannot be reached or does not fit the others.",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML configuration; its `experts:` are asked")
    parser.add_argument(
        "--endpoint", action="append", metavar="grpc://HOST:PORT", help="a worker to ask instead; may be repeated"
    )
    parser.add_argument("--model", metavar="DIR_OR_NAME", help="what they serve (the configuration's, with --config)")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="experts of a token, where no model is named")
    parser.add_argument("--calls", type=_positive, default=50, metavar="N", help="small calls to each worker (50)")
    parser.add_argument("--token-file", metavar="FILE", help="the gateways' secret, where workers ask for one")
    parser.add_argument("--grpc", action="store_true", help="over gRPC also to workers on this host")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    return parser.parse_args(argv)


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
    if findings.probes:
        table = Table(
            box=box.SIMPLE_HEAD, caption="ms, medians; round trip: a call without rows", caption_justify="left"
        )
        for heading in ("worker", "experts", "over", "round trip", "MB/s", "expert, 1 row", "32 rows"):
            table.add_column(heading, justify="left" if heading == "worker" else "right", no_wrap=True)
        for address, each in findings.probes.items():
            timing, over = each.timing, "local link" if each.local_link else "gRPC"
            rate = f"{1e-6 / timing.seconds_per_byte:.0f}" if timing.seconds_per_byte else "-"
            times = [f"{seconds * MS:.2f}" for seconds in (timing.round_trip, timing.few, timing.many)]
            table.add_row(address, str(findings.experts[address]), over, times[0], rate, *times[1:])
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
