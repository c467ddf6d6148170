"""Symmetric int4 as formats store it, brought to the groups that consilium.int4 computes with: no number changes.

Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.int4 import Int4Rows

HALF = 8  # the zero point of symmetric int4, as it is stored


def int4_rows(packed: Tensor, scales: Tensor, groups: Tensor, size: int) -> Int4Rows | None:
    """From packed int32 [N, K / 8], scales float32 [N, G] and the group [K] of each input.

    None where groups are not of ``size`` inputs one after the other (one of all inputs is cut into such), or where K is
    no multiple of 8.
    """
    inputs = len(groups)
    expected = torch.arange(inputs) // size
    if inputs % 8 or not torch.equal(groups, expected if scales.shape[1] > 1 else torch.zeros_like(expected)):
        return None
    return Int4Rows(packed, scales.expand(-1, -(-inputs // size)) if scales.shape[1] == 1 else scales, size)
