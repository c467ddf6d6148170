"""`consilium inspect`."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from consilium.config import Config, Quantization, RowDType
from consilium.errors import ConfigError
from consilium.units import parse_size

# Of tables that no terminal shows.
WIDTH = 140


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's flags."""
    parser = commands.add_parser(
        "inspect",
        help="say what a model is, what it takes, and where it fits",
        description="Reads config.json and the headers of the weights, and no weight: parameters, bytes by group as "
        "stored and as served, what fits one machine, and a split for several. Half a GiB is counted for each process, "
        "and a tenth of a machine's memory is left to the system.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, a fetched model, or a shape")
    parser.add_argument("--memory", metavar="SIZE,…", help="machines that the whole model may fit (this one)")
    parser.add_argument("--machines", metavar="SIZE,…", help="suggest a split for these: 16GiB,16GiB,8GiB")
    parser.add_argument("--quantization", choices=get_args(Quantization), default="int8", help="of the split (int8)")
    parser.add_argument("--dtype", choices=get_args(RowDType), default="float32", help="of the split (float32)")
    parser.add_argument(
        "--cache", metavar="SIZE", help="memory for keys and values (gateway.kv_cache_memory's default)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, in bytes")
    parser.set_defaults(command=show)


def show(options: argparse.Namespace) -> int:
    """Print the report. Raises ConfigError and CheckpointError."""
    from rich.console import Console

    from consilium.inspect import report
    from consilium.inspect.served import Mode
    from consilium.model_folder import read_model_folder
    from consilium.models import resolve_model

    model = read_model_folder(resolve_model(options.model))
    if model.int8 and options.quantization == "none":
        raise ConfigError(f"--quantization none: {options.model} is int8 on disk; choose int8 or int4")
    sizes = _sizes("--cache", options.cache) or [Config().gateway.kv_cache_memory]
    memory, machines = _sizes("--memory", options.memory), _sizes("--machines", options.machines)
    mode = Mode(options.quantization, options.dtype, model.int4_group)
    found = report.inspect(model, options.model, mode, sizes[0], memory, machines)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        report.show(found, console if console.is_terminal else Console(width=WIDTH))
    return 0


def _sizes(flag: str, text: str | None) -> list[int]:
    """Raises ConfigError that names the flag."""
    try:
        return [] if text is None else [parse_size(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: {error}") from None
