"""The experts that a worker holds as kernels on its device, for whole steps: tables that stay where they are.

Letters: E experts in a layer, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.gpu.experts import ExpertForm, compute, table_of
from consilium.gpu.sort import sort_pairs
from consilium.gpu.tiling import Tilings, batch_of, nearest
from expert_service.store import ExpertStore


class DeviceKernels:
    """Nothing here waits for the device, but for :meth:`refresh` where experts came or went."""

    def __init__(
        self,
        store: ExpertStore,
        form: ExpertForm,
        tilings: Tilings,
        device: torch.device,
        layers: Sequence[int],
        experts: int,
    ) -> None:
        """``experts`` are E, whoever holds them."""
        self.device, self.layers = device, list(layers)
        self._store, self._form, self._tilings, self._experts = store, form, tilings, experts
        none = table_of(form, [None] * experts)
        self._tables = {layer: none.to(device, copy=True) for layer in self.layers}  # int64 [E, columns]
        self._seen: dict[int, int] = {}  # changes of the store, by layer, that the tables have
        self._lock = threading.Lock()  # several links refresh
        self.refresh()

    def refresh(self) -> None:
        """Tables are written where they lie, for graphs that read them."""
        with self._lock:
            if self._seen == self._store.changes:
                return
            changes = dict(self._store.changes)
            for layer in self.layers:
                if self._seen.get(layer) != changes.get(layer):
                    held = self._store.held(layer)
                    self._tables[layer].copy_(table_of(self._form, [held.get(each) for each in range(self._experts)]))
            self._seen = changes

    def table(self, layer: int) -> Tensor:
        return self._tables[layer]

    def launch(self, layer: int, rows: Tensor, scales: Tensor | None, ids: Tensor, out: Tensor) -> None:
        table, pairs = self._tables[layer], ids.numel()
        tiling = nearest(self._tilings, batch_of(pairs, self._experts))
        groups = sort_pairs(ids.view(len(rows), -1), table, tiling.block_m)
        compute(self._form, tiling, table, groups, rows, scales, out)
