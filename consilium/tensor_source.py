"""Where a checkpoint's tensors come from: what `Checkpoint` needs to know of files, or of what stands in for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class TensorSlice(Protocol):
    """A tensor that is not read yet."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str:
        """As safetensors names it: F32, BF16, I8, …"""
        ...

    def __getitem__(self, index: slice | int) -> Tensor: ...


class TensorSource(Protocol):
    """Tensors by name."""

    def __contains__(self, name: object) -> bool: ...

    def find(self, name: str) -> TensorSlice:
        """The tensor called ``name``. Raises CheckpointError when it is missing or damaged."""
        ...

    def metadata(self, name: str) -> Mapping[str, str]:
        """What was noted beside the tensor when it was written."""
        ...

    def place(self, name: str) -> str:
        """Where the tensor is, for people."""
        ...
