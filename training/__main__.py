"""`python -m training RECIPE --out DIR`; also `consilium train`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from consilium.errors import ConsiliumError


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="consilium train",
        description="Turns a dense llama model into a trained Mixture of Experts in Mixtral's format, on a GPU where "
        "there is one. An interrupted run goes on at its last checkpoint when it is started again.",
    )
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file; training/recipes has examples")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    from training.recipe import load_recipe
    from training.run import train

    try:
        train(load_recipe(options.recipe), options.out)
    except ConsiliumError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
