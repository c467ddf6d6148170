"""The key of a cached row: everything that the bits of its experts' outputs depend on.

In int8 an expert's output is a function of the quantized row, its scale, the expert's weights and the arithmetic, and
of nothing else: no other row, worker or batch. So the key is made of these, and of nothing else.

Letters: T tokens of the step, D hidden size, K experts per token, E experts in a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gateway.batches import ExpertBatches, experts_of_tokens
from gateway.placement import ExpertIdentity

SCHEMA = 1  # raised whenever keys or values of the old version would be misread
NAMESPACE = b"consilium:expert:"  # what an access rule of Redis may allow: ~consilium:expert:*
_CONTEXT_BYTES = 16


class RowKeys:
    """Makes keys for rows all of whose experts ``identities`` knows; outputs for others are not kept.

    A key is SHA-256 over the salt's own hash, the row, its scale, and for each of its experts the hash of schema
    version, layer, expert, weights, numerics class and reply dtype.
    """

    def __init__(self, identities: Mapping[tuple[int, int], ExpertIdentity], reply_dtype: str, salt: str) -> None:
        self.identities = identities
        self._reply_dtype = reply_dtype
        self._salt = np.frombuffer(hashlib.sha256(salt.encode()).digest(), dtype=np.uint8)
        self._layers: dict[int, tuple[NDArray[np.uint8], NDArray[np.bool_]]] = {}

    def of_rows(self, layer: int, batches: ExpertBatches) -> list[bytes | None]:
        """The key of each of the T rows; None where the outputs cannot be kept."""
        if batches.scales is None:
            raise TypeError("only int8 rows, which come with scales, have keys")
        contexts, known = self._experts(layer)
        experts = np.minimum(experts_of_tokens(batches), len(known) - 1)  # [T, K]
        count = len(experts)
        parts = [
            np.broadcast_to(self._salt, (count, len(self._salt))),
            batches.rows.numpy().view(np.uint8),  # [T, D]
            batches.scales.numpy().view(np.uint8).reshape(count, 4),
            contexts[experts].reshape(count, -1),
        ]
        content = np.concatenate(parts, axis=1)
        width, view = content.shape[1], memoryview(content.tobytes())
        keep = np.flatnonzero(known[experts].all(axis=1))
        keys: list[bytes | None] = [None] * count
        for row in keep.tolist():
            keys[row] = hashlib.sha256(view[row * width : (row + 1) * width]).digest()
        return keys

    def _experts(self, layer: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The context of each expert of a layer, and whether it is known."""
        if layer not in self._layers:
            identities = {expert: identity for (each, expert), identity in self.identities.items() if each == layer}
            count = max(identities, default=-1) + 2  # the last one stands for any that follow, which are not known
            contexts = np.zeros((count, _CONTEXT_BYTES), dtype=np.uint8)
            known = np.zeros(count, dtype=np.bool_)
            for expert, identity in identities.items():
                contexts[expert] = np.frombuffer(self._context(layer, expert, identity), dtype=np.uint8)
                known[expert] = True
            self._layers[layer] = contexts, known
        return self._layers[layer]

    def _context(self, layer: int, expert: int, identity: ExpertIdentity) -> bytes:
        parts = [SCHEMA, layer, expert, identity.weights.hex(), identity.numerics_class, self._reply_dtype]
        return hashlib.sha256(json.dumps(parts).encode()).digest()[:_CONTEXT_BYTES]


def redis_names(layer: int, keys: Sequence[bytes]) -> list[bytes]:
    """What rows with these keys are called in Redis; the layer is there for people who look."""
    prefix = NAMESPACE + b"%d:%d:" % (SCHEMA, layer)
    return [prefix + key.hex().encode() for key in keys]
