"""A GGUF file: its metadata, and its tensors as float32."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from consilium.errors import CheckpointError

Array = npt.NDArray[np.float32]
T = TypeVar("T")


class GgufFile:
    """One file, memory-mapped; a tensor takes memory only while it is in use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def value(self, key: str, kind: type[T]) -> T:
        """The metadata under ``key``, checked to be a ``kind``. Raises CheckpointError."""
        field = self._reader.fields.get(key)
        value = None if field is None else field.contents()
        if not isinstance(value, kind):
            raise CheckpointError(f"{self._path.name}: {key} must be {kind.__name__}, found {value!r:.80}")
        return value

    def tensor(self, name: str) -> Array:
        """The tensor dequantized, with the output dimension first as in Hugging Face folders. Raises KeyError."""
        tensor = self._tensors[name]
        # As a plain array: each of the thousands of slices that dequantize takes of a memmap costs microseconds.
        return np.ascontiguousarray(dequantize(np.asarray(tensor.data), tensor.tensor_type), dtype=np.float32)
