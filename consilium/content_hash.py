"""Which weights a worker computes with, in 16 bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from consilium.matrix import Prepared, Stored, tensors_of

HASH_BYTES = 16


def content_hash(matrices: Iterable[Stored | Prepared]) -> bytes:
    """The first 16 bytes of SHA-256 over dtype, shape and bytes of every tensor; values come before scales."""
    digest = hashlib.sha256()
    for matrix in matrices:
        for tensor in tensors_of(matrix):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()[:HASH_BYTES]
