"""What stands between an expert's products: SiLU(gate) * up, or gpt-oss's clamped variant of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consilium.kernels import arithmetic
from consilium.model_config import ClampedSwiGLU
from consilium.silu import silu_and_multiply


def activate(gate: Tensor, up: Tensor, how: ClampedSwiGLU | None) -> Tensor:
    """Rows [P, F] float32 from the products with gate and up [P, F] float32; None is SiLU(gate) * up."""
    if how is None:
        return silu_and_multiply(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    numbers = gate.numel(), np.float32(how.alpha), np.float32(how.limit)
    arithmetic.clamped_swiglu_all(gate.data_ptr(), up.data_ptr(), *numbers, hidden.data_ptr())
    return hidden
