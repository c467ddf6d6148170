"""RMS norm of the residual stream. Letters: T rows, D hidden size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.kernels import norm as kernel


class RMSNorm:
    """In float32 by our kernel, whose order is fixed; in bfloat16 by torch, whose is too on one machine."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        # Copied: in the file it may lie at an address that no float32 has.
        self._weight = checkpoint.tensor(name, (checkpoint.config.hidden_size,)).to(dtype, copy=True)
        self._eps = checkpoint.config.rms_norm_eps

    @property
    def address(self) -> int:
        """Of the weight [D]."""
        return self._weight.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        if x.dtype is not torch.float32:
            return nn.rms_norm(x, x.shape[1:], self._weight, self._eps)
        out = torch.empty_like(x)
        kernel.rms_norm(x.data_ptr(), *x.shape, self._weight.data_ptr(), np.float32(self._eps), out.data_ptr())
        return out
