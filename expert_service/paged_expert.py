"""An expert whose matrices lie on disk: where its bytes are, and how they are read into memory of ours.

They are read with pread, never through a mapping: a mapped file that somebody cuts short ends the process (SIGBUS), and
what is read from it stays in the process's memory until the kernel thinks otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from consilium.errors import ConfigError, UnreadableWeights
from consilium.experts import ExpertWeights

ALIGNMENT = 64  # of every tensor in memory: kernels read whole cache lines

Locate = Callable[[Tensor], tuple[Path, int] | None]  # the file a tensor is a view of, and its first byte there


class StoredFile:
    """A file that is open as long as something lies in it, whatever becomes of its name."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, begin: int, room: memoryview) -> None:
        """Fill ``room`` with the bytes from ``begin`` on. Raises UnreadableWeights."""
        try:
            while room:
                count = os.preadv(self._descriptor, [room], begin)
                if not count:
                    raise UnreadableWeights(f"{self._path} is shorter than it was; {_ADVICE}")
                room, begin = room[count:], begin + count
        except OSError as error:
            raise UnreadableWeights(f"{self._path} cannot be read ({error.strerror}); {_ADVICE}") from None

    def advise(self, begin: int, nbytes: int) -> None:
        """Have the kernel begin to read what will be wanted soon."""
        os.posix_fadvise(self._descriptor, begin, nbytes, os.POSIX_FADV_WILLNEED)


_ADVICE = "put the checkpoint back and start this worker anew"


class PagedExpert:
    """Where each tensor of an expert is: on disk, or, what is small or was computed, in memory."""

    __slots__ = ("_layout", "_nbytes", "_parts", "room")

    def __init__(self, weights: ExpertWeights, layout: ExpertWeights, locate: Locate, files: OpenFiles) -> None:
        """``weights`` as prepared from a mapped checkpoint, of which no byte is read; ``layout`` is any of their kind.

        Raises ConfigError where none of them is mapped: they would have to be computed anew each time.
        """
        self._layout, self._nbytes = layout, weights.nbytes()
        self._parts: list[tuple[StoredFile, int, int] | Tensor] = []  # file, first byte, bytes
        for tensor in weights.tensors():
            place = locate(tensor)
            self._parts.append(tensor if place is None else (files.open(place[0]), place[1], tensor.nbytes))
        self.room = sum(_aligned(nbytes) for _, _, nbytes in self._stored())  # bytes that it takes when it is read
        if not self.room:
            raise ConfigError(
                "worker.memory_limit: experts can stay on disk only where the checkpoint has them as they are computed "
                "with; write such a one with: consilium quantize MODEL OUT (of a shape: consilium model random)"
            )

    def nbytes(self) -> int:
        """Of all its tensors."""
        return self._nbytes

    def content_hash(self) -> bytes:
        """Equal for equal weights (consilium.content_hash); reads them. Raises UnreadableWeights."""
        return self.copy().content_hash()

    def advise(self) -> None:
        """Have the kernel begin to read it."""
        for file, begin, nbytes in self._stored():
            file.advise(begin, nbytes)

    def read(self, room: Tensor) -> ExpertWeights:
        """Its weights, read into ``room``, uint8 [self.room or more], of which they are views.

        Raises UnreadableWeights.
        """
        tensors = self._read(room)
        return self._layout.map(lambda _: next(tensors))

    def copy(self) -> ExpertWeights:
        """Its weights in memory of their own. Raises UnreadableWeights."""
        return self.read(torch.empty(self.room, dtype=torch.uint8))

    def _read(self, room: Tensor) -> Iterator[Tensor]:
        start = 0
        for part, like in zip(self._parts, self._layout.tensors(), strict=True):
            if isinstance(part, Tensor):
                yield part
                continue
            file, begin, nbytes = part
            own = room[start : start + nbytes]
            file.read(begin, own.numpy().data)
            yield own.view(like.dtype).view(like.shape)
            start += _aligned(nbytes)

    def _stored(self) -> Iterator[tuple[StoredFile, int, int]]:
        return (part for part in self._parts if not isinstance(part, Tensor))


class OpenFiles:
    """Each file is opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, StoredFile] = {}

    def open(self, path: Path) -> StoredFile:
        """Raises OSError."""
        if path not in self._open:
            self._open[path] = StoredFile(path)
        return self._open[path]


def largest_room(layout: ExpertWeights) -> int:
    """Bytes of memory for any expert like ``layout``, all of which lies on disk."""
    return sum(_aligned(tensor.nbytes) for tensor in layout.tensors())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
