"""What a whole step on a device needs of this worker's experts. Nothing here needs a device to be imported.

Letters: E experts in a layer, K experts of a token, P (token, expert) pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LayerKernels(Protocol):
    """The experts of this worker as kernels that need no host between them."""

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> Sequence[int]:
        """Those with experts, ascending."""
        ...

    def refresh(self) -> None:
        """Between two steps of a link: know what is held now."""

    def table(self, layer: int) -> Tensor:
        """[E, any] int64, always the same memory; the first of a row is 0 for an expert that is not here."""
        ...

    def launch(self, layer: int, rows: Tensor, scales: Tensor | None, ids: Tensor, out: Tensor) -> None:
        """Row p of ``out`` [P, D] by expert ids[p] from row p // K, for all p whose id is not -1; others stay."""
        ...
