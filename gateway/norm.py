"""RMS norm or layer norm of the residual stream. Letters: T rows, D hidden size."""

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


class LayerNorm:
    """As ``RMSNorm``, less the mean, plus a bias."""

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        shape = (checkpoint.config.hidden_size,)
        names = name, f"{name.removesuffix('weight')}bias"
        self._weight, self._bias = (checkpoint.tensor(each, shape).to(dtype, copy=True) for each in names)
        self._eps = checkpoint.config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        if x.dtype is not torch.float32:
            return nn.layer_norm(x, x.shape[1:], self._weight, self._bias, self._eps)
        out = torch.empty_like(x)
        tensors = self._weight.data_ptr(), self._bias.data_ptr()
        kernel.layer_norm(x.data_ptr(), *x.shape, *tensors, np.float32(self._eps), out.data_ptr())
        return out


def make_norm(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> RMSNorm | LayerNorm:
    """The kind that the model's family has."""
    return (LayerNorm if checkpoint.config.layer_norm else RMSNorm)(checkpoint, name, dtype)
