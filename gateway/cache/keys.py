"""The key of a cached row: everything that the bits of an expert's output depend on.

In int8 an output row is a function of the quantized row, its scale, the expert's weights and the arithmetic, and of
nothing else: no other row, worker or batch. So the key is made of these, and of nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from gateway.batches import ExpertBatches
from gateway.placement import ExpertIdentity

SCHEMA = 1  # raised whenever keys or values of the old version would be misread
NAMESPACE = b"consilium:expert:"  # what an access rule of Redis may allow: ~consilium:expert:*


class RowKeys:
    """Makes keys for the experts that ``identities`` knows; outputs of others are not kept."""

    def __init__(self, identities: Mapping[tuple[int, int], ExpertIdentity], reply_dtype: str, salt: str) -> None:
        self.identities = identities
        self._reply_dtype = reply_dtype
        salted = salt.encode()
        self._digest = hashlib.sha256(len(salted).to_bytes(8, "little") + salted)
        self._prefixes: dict[tuple[int, int], bytes | None] = {}

    def of_pairs(self, layer: int, batches: ExpertBatches) -> list[bytes | None]:
        """The key of every pair of ``batches``, in their order; None where the output cannot be kept."""
        digests = self._digests(batches)
        keys: list[bytes | None] = []
        for position, expert in enumerate(batches.experts.tolist()):
            prefix = self._prefix(layer, expert)
            tokens = batches.tokens[batches.offsets[position] : batches.offsets[position + 1]].tolist()
            keys += [None if prefix is None else prefix + digests[token] for token in tokens]
        return keys

    def _digests(self, batches: ExpertBatches) -> list[bytes]:
        """One for each token row: SHA-256, in hexadecimal, over salt, int8 values and scale."""
        if batches.scales is None:
            raise TypeError("only int8 rows, which come with scales, have keys")
        values = batches.rows.numpy().view(np.uint8)  # [T, D]
        scales = batches.scales.numpy().view(np.uint8).reshape(-1, 4)  # [T, 4]
        content = memoryview(np.concatenate([values, scales], axis=1).tobytes())
        width = values.shape[1] + scales.shape[1]
        digests = []
        for start in range(0, len(content), width):
            digest = self._digest.copy()
            digest.update(content[start : start + width])
            digests.append(digest.hexdigest().encode())
        return digests

    def _prefix(self, layer: int, expert: int) -> bytes | None:
        """The part of the key that all rows of one expert share."""
        if (layer, expert) not in self._prefixes:
            identity = self.identities.get((layer, expert))
            self._prefixes[layer, expert] = None if identity is None else self._make_prefix(layer, expert, identity)
        return self._prefixes[layer, expert]

    def _make_prefix(self, layer: int, expert: int, identity: ExpertIdentity) -> bytes:
        parts = [SCHEMA, identity.weights.hex(), identity.numerics_class, self._reply_dtype]
        context = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        return NAMESPACE + f"{SCHEMA}:{layer}:{expert}:{context}:".encode()
