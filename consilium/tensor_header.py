"""The header of a safetensors file: dtype and place of every tensor. No weight is read. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from consilium.errors import CheckpointError

# A header of more is damage: a million tensors take about 200 MB.
LONGEST_HEADER = 2**28
_LENGTH_BYTES = 8


class StoredTensor(NamedTuple):
    """A tensor on disk."""

    name: str
    dtype: str  # as safetensors names it: F32, BF16, I8, …
    nbytes: int
    begin: int = 0  # its first byte in the file


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file: eight bytes of a length, then that much JSON. Raises CheckpointError."""
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(_LENGTH_BYTES), "little")
            if length > LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(content.read(length))
        return list(_tensors(header, _LENGTH_BYTES + length))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; is the download complete?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged or cut short ({error}); download it again") from None


def _tensors(header: dict[str, Any], data: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = map(int, entry["data_offsets"])
            yield StoredTensor(name, str(entry["dtype"]), end - start, data + start)
