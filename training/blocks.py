"""Token blocks: documents behind one another, cut to one length, with a held-out part that no training sees.

Letters: N blocks, L tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilium.errors import ConfigError

Tokens = NDArray[np.uint16]


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is never trained on: the text alone decides, so that no order and no rerun can leak it."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def join_documents(documents: Iterable[Sequence[int]], separator: int) -> Tokens:
    """All documents in one row of tokens, each with ``separator`` in front."""
    joined: list[int] = []
    for document in documents:
        joined.append(separator)
        joined += document
    return np.array(joined, np.uint16)


def cut_blocks(tokens: Tokens, length: int, name: str = "the corpus") -> Tokens:
    """[N, L]; what does not fill a block is left out. Raises ConfigError where not even one is filled."""
    count = len(tokens) // length
    if count == 0:
        raise ConfigError(
            f"{name} has {len(tokens)} tokens, which is less than one block of {length}; give more text or set a "
            "shorter block_length"
        )
    return tokens[: count * length].reshape(count, length)


def is_repetitive(row: Sequence[int], order: int = 4, least: float = 0.5) -> bool:
    """Whether fewer than ``least`` of a row's runs of ``order`` tokens are distinct: a sampler caught in a loop."""
    runs = {tuple(row[start : start + order]) for start in range(len(row) - order + 1)}
    return len(runs) < least * max(1, len(row) - order + 1)
