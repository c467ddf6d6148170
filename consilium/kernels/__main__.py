"""`python -m consilium.kernels` compiles every kernel for this CPU, for an image that is to start at once.

$CONSILIUM_KERNELS says where to; without it they go where every process keeps them.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from numpy.typing import NDArray

from consilium.kernels import (
    arithmetic,
    attention,
    attention_layer,
    capacity,
    experts,
    gate,
    gate_rules,
    grouped,
    int4_tile,
    latent,
    linear,
    norm,
    rounding,
    routing,
    sampling,
)
from consilium.kernels.float_tile import BFLOAT16, FLOAT32, LANES
from consilium.kernels.int8_tile import NAMES, candidates
from consilium.kernels.sharing import board_bytes

_SIZE = LANES


def compile_all() -> None:
    """Call each kernel once with every type that it is called with; each address is room.

    What says where something lies is zeros that nobody writes to.
    """
    room = np.zeros(2**16, np.uint8)
    at = room.ctypes.data
    one = np.float32(1)
    boards: list[NDArray[np.uint8]] = []

    def alone(phases: int) -> tuple[int, int, int]:
        boards.append(np.zeros(board_bytes(phases, 1), np.uint8))
        return boards[-1].ctypes.data, 0, 1

    for kind in candidates():
        linear.multiply_shared(kind, at, at, 1, at, at, _SIZE, _SIZE, at, alone(1))
        for form in (FLOAT32, BFLOAT16):
            for grouping in (experts.INT8, (int4_tile.WORD,)):
                experts.compute(kind, grouping, form, at, at, 0, 0, at, at, at, _SIZE, _SIZE, at, at)
        grouped.multiply_shared(kind, at, at, 1, at, at, _SIZE, _SIZE, int4_tile.WORD, at, alone(1))
    packed, scale = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
    rounding.round_rows(at, 1, int4_tile.WORD, int4_tile.WORD, packed, scale)
    rounding.interleave(packed, np.zeros((1, 1, int4_tile.CHANNELS), np.int32))
    linear.quantize(at, 1, _SIZE, at, at)
    linear.rescale_rows(at, at, 1, at, _SIZE, at)
    arithmetic.exp_all(at, 1, at)
    arithmetic.silu_and_multiply_all(at, at, 1, at)
    arithmetic.clamped_swiglu_all(at, at, 1, one, one, at)
    norm.rms_norm(at, 1, _SIZE, at, one, at)
    norm.layer_norm(at, 1, _SIZE, at, at, one, at)
    norm.norm_part(at, 1, _SIZE, _SIZE, at, one)
    gate.softmax_top_k(at, 1, _SIZE, at, _SIZE, 1, 1, at, at, at)
    gate_rules.route(at, 0, _SIZE, at, 0, 0, at, at, at, at, at)
    capacity.limit_load(
        np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_), np.zeros(1, np.int64), np.ones((1, 1), np.float32), 1
    )
    sampling.largest(at, 1, _SIZE, at, alone(1))
    limits, top_k = np.ones((1, 3), np.float32), np.ones(1, np.int64)
    sampling.draw(np.array([at]), _SIZE, limits, top_k, np.zeros(1), at, alone(1))
    sampling.likeliest(at, _SIZE, 1, at)
    numbers = np.zeros(2, np.int64)
    routing.group(numbers, 1)
    routing.select(numbers, numbers, numbers[:1], 1)
    routing.owned(numbers, numbers, 1)
    standing, real = np.zeros(1, np.int8), np.zeros(2)
    routing.assign(numbers, numbers, numbers[:0], numbers[:0], standing, real, real, real, 1)
    routing.in_order(numbers, numbers, np.zeros(1, np.int32), 1)
    routing.gather(numbers.ctypes.data, 1, _SIZE, at)
    for form in (FLOAT32, BFLOAT16):
        routing.all_finite(form, at, 1)
        routing.weighted_sum(form, numbers.ctypes.data, at, 1, 1, _SIZE, at)
        attention.attend(form, at, 1, 1, *[_SIZE] * 3, at, one, at, at, at, 0, 0, 0, at, 4 * _SIZE, at, alone(1))
        latent.multiply_heads(form, at, _SIZE, _SIZE, 1, at, 1, _SIZE, _SIZE, at, _SIZE, _SIZE, alone(1))
        for kind in candidates()[:1]:  # what is proved first; others are for tests
            layer = np.ones(attention_layer.LAYER, np.int64)  # of one head, for a step without rows
            attention_layer.compute(kind, form, one, layer.ctypes.data, at, alone(attention_layer.PHASES))


def main() -> int:
    """Exit status."""
    start = time.monotonic()
    compile_all()
    print(f"kernels compiled in {time.monotonic() - start:.1f} s: {', '.join(NAMES[kind] for kind in candidates())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
