"""Memory on both sides of the way between host and device: one buffer for many tensors, pinned on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.gpu.jit import power_of_two

ALIGNMENT = 256  # bytes: of every tensor in a buffer


class Buffer:
    """Bytes that grow as they are needed, and are used again."""

    def __init__(self, device: torch.device, pinned: bool = False) -> None:
        """On ``device``, or ``pinned`` beside it on the host."""
        self._device, self._pinned = torch.device("cpu") if pinned else device, pinned and device.type == "cuda"
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """uint8 [size]; what was taken before is overwritten."""
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # freed before more is asked for
            room = power_of_two(size)
            self._bytes = torch.empty(room, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)
        return self._bytes[:size]


def starts_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where each of them begins in a buffer of all of them, and where the last one ends."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return starts


def pack(tensors: Sequence[Tensor], buffer: Tensor, starts: Sequence[int]) -> None:
    """Copy them, which lie on the host, to their places in ``buffer``, which does, too."""
    address = buffer.data_ptr()
    for tensor, start in zip(tensors, starts, strict=False):
        whole = tensor.contiguous()
        ctypes.memmove(address + start, whole.data_ptr(), whole.nbytes)  # a fifth of what torch takes for a few bytes


def views(tensors: Sequence[Tensor], buffer: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """Tensors like them where ``buffer`` has them."""
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=False)
    ]
