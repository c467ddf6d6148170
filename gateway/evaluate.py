"""`python -m gateway.evaluate` and `consilium eval`: perplexity and agreement of every mode against `none`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from consilium.checkpoint import Checkpoint
from consilium.config import RowDType
from consilium.errors import ConfigError, ConsiliumError
from consilium.models import resolve_model
from consilium.quantize.text import encode_text, read_text
from consilium.shapes.folder import ShapeFolder
from gateway.evaluation import MODES, Score, evaluate, find_modes, split_windows

INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 when something cannot be read."""
    try:
        options = parse_arguments(argv)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        with torch.inference_mode():
            run(options)
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "consilium eval",
        description="Computes a text with every mode in this process, and says how each differs from `none`.",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or the name of a fetched model")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a text of at least two tokens, UTF-8")
    parser.add_argument("--tokens", metavar="N", type=_at_least(2), default=20480, help="tokens of it to use (20480)")
    parser.add_argument("--window", metavar="N", type=_at_least(2), default=1024, help="tokens seen at once (1024)")
    names = ",".join(mode.name for mode in MODES)
    parser.add_argument("--modes", metavar="A,B", default=names, help=f"what to compare ({names})")
    parser.add_argument("--reference", metavar="MODEL", help="the float model that an int8 MODEL was made from")
    parser.add_argument("--dtype", choices=get_args(RowDType), default="float32", help="of what is not int8 (float32)")
    parser.add_argument("--threads", metavar="N", type=_at_least(1), help="compute threads; all cores by default")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, too")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print. Raises ConfigError and CheckpointError."""
    checkpoint = Checkpoint(resolve_model(options.model))
    if isinstance(checkpoint.folder, ShapeFolder):
        raise ConfigError(f"{options.model} has random weights in int8 alone; there are no floats to compare them with")
    if checkpoint.int8 and options.reference is None:
        raise ConfigError(f"{options.model} is int8 on disk; name the float model it was made from with --reference")
    reference = Checkpoint(resolve_model(options.reference)) if options.reference else checkpoint
    text = read_text(options.text)
    tokens = encode_text(checkpoint.folder, checkpoint.config.vocab_size, text, 2, options.tokens)
    windows = list(split_windows(tokens, max(2, min(options.window, checkpoint.config.max_position))))
    modes = find_modes(options.modes.split(","))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluating", total=len(windows) * len({mode.name for mode in modes} | {"none"}))
        scores = evaluate(checkpoint, reference, modes, windows, options.dtype, lambda: bar.advance(task))
    Console().print(_table(scores))
    if options.json is not None:
        _write(options.json, options, scores)


def _table(scores: Sequence[Score]) -> Table:
    table = Table(title=f"{scores[0].positions} predicted tokens")
    table.add_column("mode", no_wrap=True)
    for column in ("perplexity", "to none", "agreement", "divergence", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            score.mode,
            f"{score.perplexity:.3f}",
            f"{score.perplexity / scores[0].perplexity - 1:+.2%}",
            f"{score.agreement:.2%}",
            f"{score.divergence:.5f}",
            f"{score.positions / score.seconds:.0f}",
        )
    return table


def _write(file: Path, options: argparse.Namespace, scores: Sequence[Score]) -> None:
    modes = {
        score.mode: {
            "perplexity": score.perplexity,
            "against_none": score.perplexity / scores[0].perplexity - 1,
            "agreement": score.agreement,
            "divergence": score.divergence,
            "seconds": score.seconds,
        }
        for score in scores
    }
    content = {
        "model": options.model,
        "reference": options.reference,
        "text": options.text.name,
        "dtype": options.dtype,
    }
    content |= {"window": options.window, "positions": scores[0].positions, "modes": modes}
    file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _at_least(fewest: int) -> Callable[[str], int]:
    """Reads a whole number of ``fewest`` or more."""

    def read(text: str) -> int:
        number = int(text)
        if number < fewest:
            raise argparse.ArgumentTypeError(f"must be at least {fewest}, not {text}")
        return number

    return read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
