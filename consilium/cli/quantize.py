"""`consilium quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from consilium.errors import ConfigError

__all__ = ["add_parser", "quantize"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's flags."""
    parser = commands.add_parser(
        "quantize",
        help="write an int8 or int4 copy of a model that starts faster and is more exact",
        description="Writes an int8 copy of a float model (compressed-tensors, W8A8), or one whose experts are int4 "
        "(W4A8): outliers are smoothed by powers of two that are found on a calibration text, then every matrix but "
        "the routers is rounded. One layer is in memory at a time. An interrupted run goes on where it stopped when it "
        "is started again.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or the name of a fetched model")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="calibration text (a built-in one of English and code)"
    )
    parser.add_argument(
        "--format", choices=("int8", "int4"), default="int8", help="of the experts; all else is int8 (int8)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model in OUT, finished or not")
    parser.set_defaults(command=quantize)


def quantize(options: argparse.Namespace) -> int:
    """Quantize a model. Raises ConfigError and CheckpointError."""
    from consilium.models import resolve_model
    from consilium.quantize.run import quantize as run

    model = resolve_model(options.model)
    if not isinstance(model, Path):
        raise ConfigError(f"{model} has int8 weights already; write them to a folder with: consilium model random")
    run(model, options.out, options.text, int4=options.format == "int4", force=options.force)
    return 0
