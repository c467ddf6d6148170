"""A model's tokenizer.json."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from consilium.errors import CheckpointError
from consilium.shapes.folder import ShapeFile


def load_tokenizer(file: Path | ShapeFile) -> tokenizers.Tokenizer:
    """The tokenizer in ``file``, which is there. Raises CheckpointError when it cannot be read."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read by the tokenizers library: {error}") from None
    # Truncation and padding in the file are for training; a text is never changed silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
