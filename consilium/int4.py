"""W4A8: int4 weights in groups of inputs and int8 activations, exact by construction. The one definition of it.

Rows of activations are quantized as in int8 (consilium.quantization). Each group of G inputs of an output channel has
a scale of its own; the last group may have fewer inputs. A product of quantized x [M, K] and w [N, K] is
    a[m, n, g] = sum over the inputs k of group g of q_x[m, k] · q_w[n, k]      exact integers
    t[m, n]    = (0 + float32(a[m, n, 0]) · s[n, 0]) + float32(a[m, n, 1]) · s[n, 1] + …     in this order
    y[m, n]    = t[m, n] · scale_x[m]
with each multiply and each add rounded to nearest even by itself, so that a row gives the same bits alone, in any
batch, and on every worker, as in int8.

Float weights are rounded when they are loaded: a group's scale is, of seven from its largest magnitude / 7 (nothing is
cut off) to / 10, the one with the least squared error, rounded to bfloat16 before it is used (consilium.kernels.
rounding). Weights that are symmetric int4 on disk, in groups of equal size, are taken as they are.
Letters: N output channels, K inputs, B = N / 16 blocks of channels, G groups, M rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.formats.scheme import INT4_GROUP
from consilium.kernels import rounding
from consilium.kernels.grouped import count_blocks, count_groups
from consilium.kernels.int4_tile import CHANNELS, WORD


class Int4Rows(NamedTuple):
    """A matrix [N, K] as compressed-tensors packs it: row n stands for (u[n] - 8) · scales[n, group of the input]."""

    packed: Tensor  # [N, K / 8] int32: u of eight inputs, the first in the lowest bits
    scales: Tensor  # [N, G] float32
    group: int  # inputs, a multiple of 8

    def floats(self) -> Tensor:
        """float32 [N, K]."""
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        values = (((self.packed[..., None] >> shifts) & 15) - 8).flatten(-2).float()  # [N, K]
        return values * self.scales.repeat_interleave(self.group, 1)[:, : values.shape[1]]


class Int4(NamedTuple):
    """The same as the kernel reads it, 16 channels side by side; those beyond N have the scale 0."""

    values: Tensor  # [B, K / 8, 16] int32
    scales: Tensor  # [B, G, 16] float32
    rows: int  # N
    group: int


def round_int4(weight: Tensor, group: int = INT4_GROUP) -> Int4Rows:
    """Round a weight matrix [N, K] of any float dtype. Raises CheckpointError where K is no multiple of 8."""
    rows, columns = weight.shape
    if columns % WORD:
        raise CheckpointError(f"rows of {columns} weights are no multiple of {WORD}, as int4 needs it; use int8")
    packed = torch.empty(rows, columns // WORD, dtype=torch.int32)
    scales = torch.empty(rows, count_groups(columns, group))
    floats = weight.float().contiguous()
    rounding.round_rows(floats.data_ptr(), rows, columns, group, packed.numpy(), scales.numpy())
    return Int4Rows(packed, scales, group)


def interleave(weight: Int4Rows) -> Int4:
    """The matrix in the kernel's order: one pass over it, in memory of its own."""
    (rows, words), groups = weight.packed.shape, weight.scales.shape[1]
    values = torch.zeros(count_blocks(rows), words, CHANNELS, dtype=torch.int32)
    rounding.interleave(weight.packed.contiguous().numpy(), values.numpy())
    scales = torch.zeros(count_blocks(rows) * CHANNELS, groups)  # [16 B, G]
    scales[:rows] = weight.scales
    return Int4(values, scales.unflatten(0, (-1, CHANNELS)).mT.contiguous(), rows, weight.group)
