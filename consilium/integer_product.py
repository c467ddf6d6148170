"""The exact product of int8 matrices on this CPU, proved before it is used.

torch's int8 products saturate silently on CPUs without VNNI, so no kernel is believed: each candidate is run on
extreme values and compared with int64, and the first that makes no mistake is taken.
Letters: M rows, N output channels, K what is summed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.errors import ConsiliumError

logger = logging.getLogger(__name__)

# float32 holds every integer up to 2^24 = 1024 · 128 · 128, so sums of 1024 products are exact in any order.
EXACT_BLOCK = 1024
# int32 holds the sum of this many products of 128 · 128.
MAX_SUMMED = (2**31 - 1) // 128**2

# A kernel may take other paths for few rows, for odd sizes and for more than one block.
PROOF_ROWS = (1, 2, 3, 4, 7, 16, 33, 64)
PROOF_SIZES = ((1, 1), (6, 1), (5, 3), (16, 64), (33, 100), (64, 576), (48, 1025), (16, 2304))  # (N, K)
EXTREMES = (-128, -127, -1, 0, 1, 126, 127)


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """``multiply(x int8 [M, K], w int8 [N, K]) -> int32 [M, N]``, exactly x @ w.T."""

    name: str
    multiply: Callable[[Tensor, Tensor], Tensor]


def find_integer_product(weight_shapes: Iterable[tuple[int, int]] = ()) -> IntegerProduct:
    """The fastest candidate that is exact here, proved also at the model's ``weight_shapes`` (N, K).

    Raises ConsiliumError when none is.
    """
    shapes = sorted(set(weight_shapes))
    reasons = []
    for product in CANDIDATES:
        mistake = find_mistake(product, shapes)
        if mistake is None:
            logger.info("integer product: %s, exact on this CPU", product.name)
            return product
        logger.warning("integer product: %s is not used: %s", product.name, mistake)
        reasons.append(f"{product.name}: {mistake}")
    raise ConsiliumError(
        f"no integer product is exact on this CPU ({'; '.join(reasons)}); run with --quantization none instead"
    )


def find_mistake(product: IntegerProduct, weight_shapes: Iterable[tuple[int, int]] = ()) -> str | None:
    """What ``product`` gets wrong on extreme values, in words; None when it is right everywhere."""
    generator = torch.Generator().manual_seed(0)
    try:
        for rows in PROOF_ROWS:
            for size in PROOF_SIZES:
                if not _right_on_random(product, rows, *size, generator):
                    return f"wrong integers for {rows} rows and a weight of {list(size)}"
            for size in weight_shapes:
                if not _right_on_outer(product, rows, *size, generator):
                    return f"wrong integers for {rows} rows and a weight of {list(size)}"
    except (RuntimeError, NotImplementedError) as error:  # what torch raises for an operator this CPU lacks
        return str(error).splitlines()[0]
    return None


def _right_on_random(product: IntegerProduct, rows: int, outputs: int, summed: int, generator: torch.Generator) -> bool:
    """Against the int64 product: all values at the extremes, one sign and mixed."""
    extremes = torch.tensor(EXTREMES, dtype=torch.int8)

    def draw(count: int) -> Tensor:
        return extremes[torch.randint(len(EXTREMES), (count, summed), generator=generator)]

    def full(count: int, value: int) -> Tensor:
        return torch.full((count, summed), value, dtype=torch.int8)

    pairs = [(draw(rows), draw(outputs))]
    pairs += [(full(rows, a), full(outputs, b)) for a in (-128, 127) for b in (-128, 127)]
    return all(torch.equal(product.multiply(x, w).long(), x.long() @ w.long().T) for x, w in pairs)


def _right_on_outer(product: IntegerProduct, rows: int, outputs: int, summed: int, generator: torch.Generator) -> bool:
    """At any size without a slow reference: x = a sᵀ and w = b sᵀ with signs s, so that x wᵀ is K · a bᵀ."""
    signs = torch.randint(2, (summed,), generator=generator, dtype=torch.int8) * 2 - 1  # [K]
    a = torch.arange(rows, dtype=torch.int8) * 2 - 127  # [M] odd, so never zero
    b = 127 - torch.arange(outputs, dtype=torch.int64).remainder(255).to(torch.int8)  # [N]
    expected = summed * torch.outer(a.long(), b.long())  # [M, N]
    return torch.equal(product.multiply(torch.outer(a, signs), torch.outer(b, signs)).long(), expected)


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    if x.shape[1] == 1:  # torch 2.13 answers with garbage
        return x.int() * w.int().T
    return torch._int_mm(x, w.T)


def _float_blocks(x: Tensor, w: Tensor) -> Tensor:
    """Float32 products over blocks of K, each exact, summed in int32. Right everywhere, and several times slower."""
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.int32)
    for start in range(0, x.shape[1], EXACT_BLOCK):
        block = slice(start, start + EXACT_BLOCK)
        total += torch.mm(x[:, block].float(), w[:, block].float().T).to(torch.int32)
    return total


# In order of speed. Measured on Cascade Lake with VNNI, one thread, cold weights, µs for M = 1, 4, 16, 64:
#   576×384:    _int_mm 34, 65, 73, 139      float_blocks 125, 195, 306, 531
#   2048×1024:  _int_mm 240, 409, 504, 904   float_blocks 1192, 1484, 2660, 5157
CANDIDATES = (IntegerProduct("torch._int_mm", _int_mm), IntegerProduct("float32 blocks", _float_blocks))
