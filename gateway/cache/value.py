"""One cached row as Redis holds it: it says what it is, and anything that is not exactly that is not a row.

magic and version  4 bytes
dtype              1 byte, as on the wire
dimensions         1 byte, always 2
reserved           2 bytes, 0
shape              2 × 4 bytes: experts per token, hidden size
checksum          16 bytes, BLAKE2b over key, the header up to here, and data, keyed with the salt
data               the outputs of the row's experts, in ascending order of experts; little-endian
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import torch

from consilium.wire import WIRE_DTYPES

_HEADER = struct.Struct("<4sBBHII")
_MAGIC = b"CXR\x01"
CHECKSUM_BYTES = 16


class RowCodec:
    """Rows of one dtype and shape, under one salt."""

    def __init__(self, dtype: torch.dtype, top_k: int, hidden_size: int, salt: str) -> None:
        self.row_bytes = top_k * hidden_size * dtype.itemsize
        self._header = _HEADER.pack(_MAGIC, WIRE_DTYPES[dtype], 2, 0, top_k, hidden_size)
        # The key of BLAKE2b has at most 64 bytes, a salt may have more.
        self._keyed = hashlib.blake2b(digest_size=CHECKSUM_BYTES, key=hashlib.sha256(salt.encode()).digest())
        self._start = len(self._header) + CHECKSUM_BYTES

    def encode(self, key: bytes, row: bytes | memoryview) -> bytes:
        """The value for ``row`` under ``key``."""
        return b"".join((self._header, self._checksum(key, row), row))

    def decode(self, key: bytes, value: object) -> memoryview | None:
        """The row in ``value``, or None when it is anything but what :meth:`encode` made of this key."""
        if not isinstance(value, bytes) or len(value) != self._start + self.row_bytes:
            return None
        row = memoryview(value)[self._start :]
        checksum = value[len(self._header) : self._start]
        whole = value.startswith(self._header) and hmac.compare_digest(checksum, self._checksum(key, row))
        return row if whole else None

    def _checksum(self, key: bytes, row: bytes | memoryview) -> bytes:
        checksum = self._keyed.copy()
        checksum.update(len(key).to_bytes(4, "little") + key + self._header)
        checksum.update(row)
        return checksum.digest()
