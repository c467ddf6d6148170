"""Which kernel for int4 weights is exact on this CPU, proved before it is used, to the last bit of its definition.

Letters: M rows, N output channels, K inputs, G groups.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from consilium.errors import ConsiliumError
from consilium.formats.scheme import INT4_GROUP
from consilium.int4 import Int4Rows, interleave
from consilium.int4_experts import GroupedProduct
from consilium.kernels import int4_tile, int8_tile
from consilium.quantization import Quantized

logger = logging.getLogger(__name__)

PROOF_ROWS = (1, 2, 3, 4, 7)  # every tile, alone and after others
PROOF_SIZES = ((1, 8, 8), (16, 64, 32), (33, 104, 32), (48, 1032, 128))  # (N, K, group)
PROOF_OUTPUTS = 40  # of the model's own shapes: tiles do not know how many there are


def find_grouped_product(weight_shapes: Iterable[tuple[int, int]] = (), group: int = INT4_GROUP) -> GroupedProduct:
    """The fastest kernel that is exact here, proved also at the model's ``weight_shapes`` (N, K).

    Raises ConsiliumError when there is none.
    """
    shapes = [*PROOF_SIZES, *((min(n, PROOF_OUTPUTS), k, group) for n, k in sorted(set(weight_shapes)))]
    for kind in int8_tile.candidates():
        product = GroupedProduct(kind)
        mistake = find_mistake(product, shapes)
        if mistake is None:
            logger.info("int4 product: %s kernel, exact on this CPU", int8_tile.NAMES[kind])
            return product
        logger.warning("the %s int4 kernel is not used: %s", int8_tile.NAMES[kind], mistake)
    raise ConsiliumError("no int4 kernel is exact on this CPU; run with --quantization none instead")


def find_mistake(product: GroupedProduct, shapes: Iterable[tuple[int, int, int]]) -> str | None:
    """What ``product`` gets wrong at (N, K, group), in words; None when it is right everywhere."""
    generator = torch.Generator().manual_seed(0)
    for outputs, size, group in shapes:
        weight = _random_weight(outputs, size, group, generator)
        prepared = interleave(weight)
        for rows in PROOF_ROWS:
            x = _random_rows(rows, size, generator)
            if not torch.equal(product.multiply(x, prepared), define_product(x, weight)):
                return f"wrong numbers for {rows} rows and a weight of {[outputs, size]} in groups of {group}"
    return None


def define_product(x: Quantized, weight: Int4Rows) -> Tensor:
    """The definition of consilium.int4, step by step: float32 [M, N]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (((weight.packed[..., None] >> shifts) & 15) - 8).flatten(-2).long()  # [N, K]
    total = torch.zeros(len(x.values), len(numbers))  # [M, N]
    for group in range(weight.scales.shape[1]):
        inside = slice(group * weight.group, (group + 1) * weight.group)
        sums = x.values[:, inside].long() @ numbers[:, inside].T  # [M, N]
        total = total + sums.float() * weight.scales[:, group]
    return total * x.scales[:, None]


def _random_weight(outputs: int, size: int, group: int, generator: torch.Generator) -> Int4Rows:
    """Every number there is, and whole rows of the extremes."""
    words = torch.randint(-(2**31), 2**31, (outputs, size // int4_tile.WORD), generator=generator)
    words[::5], words[1::5] = 0, -1  # -8 and 7 everywhere
    scales = torch.rand(outputs, -(-size // group), generator=generator)
    return Int4Rows(words.to(torch.int32), scales, group)


def _random_rows(rows: int, size: int, generator: torch.Generator) -> Quantized:
    values = torch.randint(-128, 128, (rows, size), generator=generator)
    values[0] = 127 if rows % 2 else -128
    return Quantized(values.to(torch.int8), torch.rand(rows, generator=generator))
