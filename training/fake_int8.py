"""int8 as consilium.quantization defines it, computed in floats and seen through by gradients.

The forward pass rounds as the workers do; the backward pass takes the rounding for the identity (a straight-through
estimator, Bengio et al. 2013), so that weights learn to stand where rounding costs least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.quantization import LEVELS

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def fake_int8(x: Tensor) -> Tensor:
    """[…, N] with every row of N on its 255 levels: in float32 ``quantize_rows``' values · scales, bit for bit."""
    wide = x.detach().float()
    scales = wide.abs().amax(-1, keepdim=True) / wide.new_full((), LEVELS)  # […, 1]
    usable = scales >= _SMALLEST_SCALE
    rounded = (wide / torch.where(usable, scales, 1.0)).round() * torch.where(usable, scales, 0.0)
    return rounded.to(x.dtype) + (x - x.detach())
