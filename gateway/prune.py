"""`consilium prune`: writes a model with fewer experts, and says what that costs in perplexity."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consilium.checkpoint import Checkpoint
from consilium.errors import ConsiliumError
from consilium.model_folder import read_json
from consilium.models import resolve_model
from consilium.prune.choose import read_load
from consilium.prune.write import Pruning, kept_share, prune
from consilium.quantize.text import encode_text, read_text
from gateway.evaluation import Mode, evaluate, split_windows

PRUNED = Mode("pruned", "none")
WINDOW = 1024


def main(argv: Sequence[str]) -> int:
    """Prune and print what it costs; 1 when something cannot be read or written."""
    options = parse_arguments(argv)
    try:
        with torch.inference_mode():
            run(options, Console())
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:
        print(f"error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 1
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "consilium prune",
        description="Writes a copy of a model without the least used experts of every layer. Experts are counted by a "
        "gateway while it serves: curl http://GATEWAY/load/experts > load.json",
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder, or the name of a fetched model")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--load", metavar="FILE", type=Path, required=True, help="what /load/experts said")
    parser.add_argument("--drop", metavar="N", type=int, required=True, help="experts to drop in every layer")
    parser.add_argument("--merge", action="store_true", help="merge each into the expert that is most like it")
    parser.add_argument("--text", metavar="FILE", type=Path, help="a text to say the cost on")
    parser.add_argument("--tokens", metavar="N", type=int, default=8192, help="tokens of it to use (8192)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, console: Console) -> None:
    """Write the folder, then compare. Raises ConfigError and CheckpointError."""
    checkpoint = Checkpoint(resolve_model(options.model))
    config = checkpoint.config
    pruning = Pruning(read_load(read_json(options.load), config), options.drop, options.merge)
    text = None if options.text is None else read_text(options.text)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("pruning", total=config.num_layers + 1)
        prune(checkpoint, options.out, pruning, lambda: bar.advance(task))
    done = "merged into others" if options.merge else "dropped"
    console.print(
        f"{options.drop} of {config.num_experts} experts a layer {done}; "
        f"{kept_share(pruning, config.top_k):.1%} of the rows went to those that stay",
        soft_wrap=True,
    )
    if text is None:
        return
    tokens = encode_text(checkpoint.folder, config.vocab_size, text, 2, options.tokens)
    windows = list(split_windows(tokens, min(WINDOW, config.max_position)))
    before, after = evaluate(Checkpoint(options.out), checkpoint, [PRUNED], windows, "float32")
    console.print(
        f"perplexity {before.perplexity:.3f} before, {after.perplexity:.3f} after "
        f"({after.perplexity / before.perplexity - 1:+.2%}), divergence {after.divergence:.5f} nats",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
