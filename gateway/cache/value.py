"""One cached row as Redis holds it: it says what it is, and anything that is not exactly that is not a row.

magic and version  4 bytes
dtype              1 byte, as on the wire
dimensions         1 byte, always 1
reserved           2 bytes, 0
length             4 bytes, elements
checksum          16 bytes, BLAKE2b over key, the header up to here, and data, keyed with the salt
data               little-endian elements
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import torch

from consilium.wire import WIRE_DTYPES

_HEADER = struct.Struct("<4sBBHI")
_MAGIC = b"CXR\x01"
CHECKSUM_BYTES = 16


class RowCodec:
    """Rows of one dtype and length, under one salt."""

    def __init__(self, dtype: torch.dtype, hidden_size: int, salt: str) -> None:
        self.row_bytes = hidden_size * dtype.itemsize
        self._header = _HEADER.pack(_MAGIC, WIRE_DTYPES[dtype], 1, 0, hidden_size)
        # The key of BLAKE2b has at most 64 bytes, a salt may have more.
        self._keyed = hashlib.blake2b(digest_size=CHECKSUM_BYTES, key=hashlib.sha256(salt.encode()).digest())
        self._start = len(self._header) + CHECKSUM_BYTES

    def encode(self, key: bytes, row: bytes) -> bytes:
        """The value for ``row`` under ``key``."""
        return self._header + self._checksum(key, row) + row

    def decode(self, key: bytes, value: object) -> bytes | None:
        """The row in ``value``, or None when it is anything but what :meth:`encode` made of this key."""
        if not isinstance(value, bytes) or len(value) != self._start + self.row_bytes:
            return None
        header, checksum, row = value[: len(self._header)], value[len(self._header) : self._start], value[self._start :]
        whole = header == self._header and hmac.compare_digest(checksum, self._checksum(key, row))
        return row if whole else None

    def _checksum(self, key: bytes, row: bytes) -> bytes:
        checksum = self._keyed.copy()
        checksum.update(len(key).to_bytes(4, "little") + key + self._header)
        checksum.update(row)
        return checksum.digest()
