"""The tokens of the calibration text: the built-in one (consilium/quantize/calibration.txt) or the user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from consilium.errors import CheckpointError, ConfigError
from consilium.shapes.folder import ShapeFolder
from consilium.tokenizer_file import load_tokenizer

# Fewer leave most channels of most experts unseen; more than the second hardly move a largest magnitude.
FEWEST_TOKENS, MOST_TOKENS = 1024, 4096


def calibration_text(file: Path | None) -> str:
    """The text in ``file``, or the built-in one. Raises ConfigError when it cannot be read."""
    if file is None:
        return files("consilium.quantize").joinpath("calibration.txt").read_text("utf-8")
    return read_text(file)


def read_text(file: Path) -> str:
    """A text file in UTF-8. Raises ConfigError that names it."""
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"--text: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {file} is not UTF-8 text (byte {error.start})") from None


def encode_text(folder: Path | ShapeFolder, vocab_size: int, text: str, fewest: int, most: int) -> list[int]:
    """The first ``most`` tokens of ``text`` in the words of the model in ``folder``.

    Raises ConfigError for a text of fewer than ``fewest`` tokens, CheckpointError for a tokenizer that is missing or
    belongs to another model.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; a text is read in the model's own tokens")
    tokenizer = load_tokenizer(file)
    tokens = tokenizer.encode(text).ids
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file} has token ids up to {largest}, but the model's vocab_size is {vocab_size}; this tokenizer belongs "
            "to another model"
        )
    if len(tokens) < fewest:
        raise ConfigError(f"the text has {len(tokens)} tokens, and at least {fewest} are needed; give a longer --text")
    return tokens[:most]
