"""SiLU(gate) · up with the same bits on every CPU; consilium.kernels.arithmetic defines it.

Letters: P rows, F expert FFN size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.kernels import arithmetic


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) · up for gate and up [P, F] float32; float32 [P, F]."""
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    arithmetic.silu_and_multiply_all(gate.data_ptr(), up.data_ptr(), gate.numel(), hidden.data_ptr())
    return hidden


def exp(x: Tensor) -> Tensor:
    """exp of every element of x, float32."""
    x = x.contiguous()
    result = torch.empty_like(x)
    arithmetic.exp_all(x.data_ptr(), x.numel(), result.data_ptr())
    return result
