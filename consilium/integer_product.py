"""The exact product of int8 matrices on this CPU, proved before it is used.

Two ways: a kernel of ours, best for few rows, and torch's, which is faster for many but saturates silently on CPUs
without VNNI. Neither is believed: each is run on extreme values and compared with int64. A wrong kernel is refused
and the next one taken; where torch's is wrong, the kernel computes many rows too.
Letters: M rows, N output channels, K what is summed over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from consilium import parallel
from consilium.errors import ConsiliumError
from consilium.kernels import int8_tile, linear
from consilium.kernels.int8_tile import Kind
from consilium.quantization import Quantized

logger = logging.getLogger(__name__)

# From so many rows on torch's product beats ours; python -m bench.kernels shows where they cross.
MANY_ROWS = 64

# A kernel may take other paths for few rows, for odd sizes and for more than one vector.
PROOF_ROWS = (1, 2, 3, 4, 7, 16, 33, 64)
MANY_PROOF_ROWS, MANY_PROOF_OUTPUTS = (96, 128, 256, 513), 2048  # for torch's product, at the model's shapes
PROOF_SIZES = ((1, 1), (6, 1), (5, 3), (16, 64), (33, 100), (64, 576), (48, 1025), (16, 2304))  # (N, K)
EXTREMES = (-128, -127, -1, 0, 1, 126, 127)

Multiply = Callable[[Tensor, Tensor], Tensor]  # x int8 [M, K], w int8 [N, K] -> [M, N], exactly x @ w.T


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """What was proved here: the kind of kernel for few rows, and torch's product for many rows, if it is right."""

    kind: Kind
    many: Multiply | None
    many_rows: int = MANY_ROWS  # from so many on

    def takes_many(self, rows: int) -> bool:
        """Whether so many rows are many."""
        return self.many is not None and rows >= self.many_rows

    @property
    def name(self) -> str:
        many = f", torch._int_mm from {self.many_rows} rows on" if self.many else ""
        return f"{int8_tile.NAMES[self.kind]} kernel{many}"

    def multiply(self, x: Quantized, w: Quantized) -> Tensor:
        """x [M, K] times the transpose of w [N, K], as consilium.quantization defines it: float32 [M, N]."""
        rows, columns = x.values.shape[0], w.values.shape[0]
        out = torch.empty(rows, columns)
        if self.many is None or not self.takes_many(rows):
            self._multiply_few(x, w, out)
            return out
        sums = self.many(x.values, w.values)  # [M, N] int32
        addresses = sums.data_ptr(), x.scales.data_ptr(), rows, w.scales.data_ptr()
        linear.rescale_rows(*addresses, columns, out.data_ptr())
        return out

    def _multiply_few(self, x: Quantized, w: Quantized, out: Tensor) -> None:
        (rows, size), columns = x.values.shape, w.values.shape[0]
        left = x.values.data_ptr(), x.scales.data_ptr(), rows
        right = w.values.data_ptr(), w.scales.data_ptr(), columns, size

        def work(sharer: parallel.Sharer) -> None:
            linear.multiply_shared(self.kind, *left, *right, out.data_ptr(), sharer)

        parallel.share(work, 1, parallel.count_slices(w.values.nbytes))

    def quantize(self, x: Tensor) -> Quantized:
        """Rows x [M, K] float32, contiguous; the same bits as quantization.quantize_rows, in one pass over each."""
        values, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
        linear.quantize(x.data_ptr(), *x.shape, values.data_ptr(), scales.data_ptr())
        return Quantized(values, scales)


def find_integer_product(weight_shapes: Iterable[tuple[int, int]] = ()) -> IntegerProduct:
    """The fastest ways that are exact here, proved also at the model's ``weight_shapes`` (N, K).

    Raises ConsiliumError when there is none.
    """
    shapes = sorted(set(weight_shapes))
    for kind in int8_tile.candidates():
        mistake = find_mistake(kernel_product(kind), shapes)
        if mistake is None:
            break
        logger.warning("the %s int8 kernel is not used: %s", int8_tile.NAMES[kind], mistake)
    else:
        raise ConsiliumError("no int8 kernel is exact on this CPU; run with --quantization none instead")
    many = partial(_of_integers, IntegerProduct(kind, torch_product, many_rows=1))
    mistake = find_mistake(many, shapes, (*PROOF_ROWS, *MANY_PROOF_ROWS))
    if mistake is not None:
        logger.warning("torch._int_mm is not used for many rows: %s", mistake)
    product = IntegerProduct(kind, None if mistake else torch_product)
    logger.info("integer product: %s, exact on this CPU", product.name)
    return product


def find_mistake(
    multiply: Multiply, weight_shapes: Iterable[tuple[int, int]] = (), row_counts: Sequence[int] = PROOF_ROWS
) -> str | None:
    """What ``multiply`` gets wrong on extreme values, in words; None when it is right everywhere."""
    generator = torch.Generator().manual_seed(0)
    try:
        for rows in row_counts:
            for size in PROOF_SIZES if rows in PROOF_ROWS else ():
                if not _right_on_random(multiply, rows, *size, generator):
                    return f"wrong integers for {rows} rows and a weight of {list(size)}"
            for outputs, summed in weight_shapes:
                few = outputs if rows in PROOF_ROWS else min(outputs, MANY_PROOF_OUTPUTS)
                if not _right_on_outer(multiply, rows, few, summed, generator):
                    return f"wrong integers for {rows} rows and a weight of {[few, summed]}"
    except (RuntimeError, NotImplementedError) as error:  # what torch raises for an operator this CPU lacks
        return str(error).splitlines()[0]
    return None


def kernel_product(kind: Kind) -> Multiply:
    """The products that a kind of kernel finds."""
    return partial(_of_integers, IntegerProduct(kind, None))


def _of_integers(product: IntegerProduct, x: Tensor, w: Tensor) -> Tensor:
    """What is served, with scales of one: the integers rounded to float32."""
    return product.multiply(Quantized(x, torch.ones(x.shape[0])), Quantized(w, torch.ones(w.shape[0])))


def torch_product(x: Tensor, w: Tensor) -> Tensor:
    """torch's own, oneDNN's where it was built with it."""
    if x.shape[1] == 1:  # torch 2.13 answers with garbage
        return x.int() * w.int().T
    return torch._int_mm(x, w.T)


def _right_on_random(multiply: Multiply, rows: int, outputs: int, summed: int, generator: torch.Generator) -> bool:
    """Against the int64 product: all values at the extremes, one sign and mixed."""
    extremes = torch.tensor(EXTREMES, dtype=torch.int8)

    def draw(count: int) -> Tensor:
        return extremes[torch.randint(len(EXTREMES), (count, summed), generator=generator)]

    def full(count: int, value: int) -> Tensor:
        return torch.full((count, summed), value, dtype=torch.int8)

    pairs = [(draw(rows), draw(outputs))]
    pairs += [(full(rows, a), full(outputs, b)) for a in (-128, 127) for b in (-128, 127)]
    return all(torch.equal(multiply(x, w).float(), (x.long() @ w.long().T).float()) for x, w in pairs)


def _right_on_outer(multiply: Multiply, rows: int, outputs: int, summed: int, generator: torch.Generator) -> bool:
    """At any size without a slow reference: x = a sᵀ and w = b sᵀ with signs s, so that x wᵀ is K · a bᵀ."""
    signs = torch.randint(2, (summed,), generator=generator, dtype=torch.int8) * 2 - 1  # [K]
    a = 2 * torch.arange(rows).remainder(128).to(torch.int8) - 127  # [M] odd, so never zero
    b = 127 - torch.arange(outputs).remainder(255).to(torch.int8)  # [N]
    expected = torch.outer(a.float(), b.float()) * summed  # [M, N] exact, then rounded once
    return torch.equal(multiply(torch.outer(a, signs), torch.outer(b, signs)).float(), expected)
