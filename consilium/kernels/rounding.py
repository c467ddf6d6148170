"""Weights become int4, and come into the order in which the product reads them (consilium.int4, kernels.int4_tile).

Letters: N output channels, K inputs, G groups of inputs, B = N / 16 blocks of channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from consilium.kernels.arithmetic import ROUNDER, ZERO, from_bfloat16, to_bfloat16
from consilium.kernels.compiler import floats, kernel
from consilium.kernels.int4_tile import CHANNELS, WORD

# A group's largest magnitude is so many steps: 7 keeps it as it is; more make steps finer, and what is beyond is cut.
STEPS = tuple(map(np.float32, (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)))
LOWEST, HIGHEST, HALF = np.float32(-8), np.float32(7), np.float32(8)
ONE, SMALLEST_SCALE = np.float32(1), np.finfo(np.float32).tiny
LOW_BYTES, LOW_HALVES, HALVES = np.uint32(0x00FF00FF), np.uint32(0x0F0F0F0F), np.uint32(0xFFFF)
BYTE, NIBBLE, HALF_WORD = np.uint32(8), np.uint32(4), np.uint32(16)


@kernel
def to_int4(weight: Any, inverse: Any) -> Any:
    """The number from -8 to 7 nearest to weight · inverse, half to even, as a float32."""
    q = (weight * inverse + ROUNDER) - ROUNDER
    q = LOWEST if q < LOWEST else q
    return HIGHEST if q > HIGHEST else q


@kernel
def squared_error(weights: Any, scale: Any, squares: Any) -> Any:
    """Of int4 with this scale; ``squares`` is room for a group.

    Element i adds to the sum i % 4, for one sum alone would wait for each of its adds.
    """
    inverse, size = ONE / scale, weights.shape[0]
    for each in range(size):
        difference = to_int4(weights[each], inverse) * scale - weights[each]
        squares[each] = difference * difference
    first, second, third, fourth = ZERO, ZERO, ZERO, ZERO
    for start in range(0, size, 4):  # sizes are multiples of 8
        first += squares[start]
        second += squares[start + 1]
        third += squares[start + 2]
        fourth += squares[start + 3]
    return (first + second) + (third + fourth)


@kernel
def find_scale(weights: Any, squares: Any) -> Any:
    """The scale of a group float32 [K / G]: of those for ``STEPS`` the first with the least squared error, in bfloat16.

    0 for a group that is zero, or so small that its scale would be subnormal.
    """
    largest = ZERO
    for weight in weights:
        largest = max(largest, abs(weight))
    best, least = ZERO, np.float32(np.inf)
    for steps in STEPS:
        scale = from_bfloat16(to_bfloat16(largest / steps))
        if scale >= SMALLEST_SCALE:
            error = squared_error(weights, scale, squares)
            if error < least:
                best, least = scale, error
    return best


@kernel
def round_rows(weights: int, rows: int, size: int, group: int, packed: Any, scales: Any) -> None:
    """packed int32 [N, K / 8] (as ``interleave`` takes it) and scales float32 [N, G] of the weights float32 [N, K]."""
    squares = np.empty(group, np.float32)
    for row in range(rows):
        for number in range(scales.shape[1]):
            first = number * group
            of_group = floats(weights + 4 * (row * size + first), min(group, size - first))
            scale = find_scale(of_group, floats(squares.ctypes.data, group))
            scales[row, number] = scale
            inverse = ZERO if scale == ZERO else ONE / scale
            for word in range(of_group.shape[0] // WORD):
                bits = np.uint32(0)
                for place in range(WORD):
                    q = to_int4(of_group[word * WORD + place], inverse) + HALF
                    bits |= np.uint32(np.int32(q)) << np.uint32(4 * place)
                packed[row, first // WORD + word] = np.int32(bits)


@kernel
def interleave(packed: Any, out: Any) -> None:
    """out int32 [B, K / 8, 16] from packed int32 [N, K / 8], eight inputs a word, the first in the lowest bits.

    Channels beyond N stay as they are.
    """
    for row in range(packed.shape[0]):
        block, lane = row // CHANNELS, row % CHANNELS
        for word in range(packed.shape[1]):
            bits = np.uint32(packed[row, word])
            low, high = bits & HALVES, bits >> HALF_WORD
            low, high = (low | low << BYTE) & LOW_BYTES, (high | high << BYTE) & LOW_BYTES
            low, high = (low | low << NIBBLE) & LOW_HALVES, (high | high << NIBBLE) & LOW_HALVES
            out[block, word, lane] = np.int32(low | high << NIBBLE)
