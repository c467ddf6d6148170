"""Compiles kernels for an H100, which takes no GPU: the interpreter takes much that Triton's compiler refuses.

A program of its own (``python -m tests.gpu.compile_kernels``), for a process either interprets or compiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from consilium.gpu import products, quantize, sort
from consilium.gpu.jit import EXACT, INTERPRETED

H100 = GPUTarget("cuda", 90, 32)


def compile_kernel(kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any]) -> None:
    """``arguments`` are the types of all that is not constant; pointers to be aligned to 16 bytes."""
    names = kernel.arg_names
    if set(names) != arguments.keys() | constants.keys():
        raise TypeError(f"{kernel.__name__} takes {names}")
    signature = {name: arguments.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind[0] == "*"}
    known = {(names.index(name),): value for name, value in constants.items()}
    found = triton.compile(ASTSource(kernel, signature, known, aligned), target=H100, options=dict(EXACT))
    ptx = found.asm["ptx"]
    if "fma.rn.f32" in ptx or ".ftz" in ptx:
        raise ValueError(f"{kernel.__name__} does not keep multiplies and adds apart, or loses tiny numbers")
    print(kernel.__name__, flush=True)


def main() -> None:
    """Compile every kernel whose bits are the CPU's, once."""
    assert not INTERPRETED
    sizes = {"D": 256, "F": 128, "BIASED": True, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}
    integers = {"INTEGER": True, "SCALED": True, "W": tl.int8, "DOT": tl.int8, **sizes}
    halves = {"INTEGER": False, "SCALED": True, "W": tl.int8, "DOT": tl.bfloat16, **sizes}
    gate_up = {"table": "*i64", "tiles": "*i32", "source": "*i32", "x": "*i8", "x_scales": "*fp32"}
    gate_up |= {"hidden": "*fp32", "largest": "*i32", "alpha": "fp32", "limit": "fp32"}
    compile_kernel(products.gate_up, gate_up, integers | {"CLAMPED": False, "HIDDEN": tl.float32})
    gate_up |= {"x": "*bf16", "hidden": "*i16"}
    compile_kernel(products.gate_up, gate_up, halves | {"CLAMPED": True, "HIDDEN": tl.bfloat16})
    down = {"table": "*i64", "tiles": "*i32", "target": "*i32", "hidden": "*fp32", "scales": "*i32", "out": "*i16"}
    compile_kernel(products.down, down, integers | {"REPLY": tl.bfloat16, "TILES": 3, "TILES_BLOCK": 4})
    down |= {"hidden": "*bf16", "out": "*i16"}
    compile_kernel(products.down, down, halves | {"REPLY": tl.bfloat16, "TILES": 0, "TILES_BLOCK": 1})
    pairs = {"ids": "*i32", "table": "*i64", "source": "*i32", "target": "*i32", "tiles": "*i32"}
    numbers = {"COLUMNS": 9, "EXPERTS": 128, "BINS": 128, "PER_TOKEN": 8, "BLOCK": 16, "CHUNK": sort.CHUNK}
    compile_kernel(sort._sort_pairs, pairs | {"pairs": "i32", "slots": "i32"}, numbers)
    rows = {"x": "*fp32", "values": "*i8", "scales": "*fp32"}
    compile_kernel(quantize._quantize_rows, rows, {"SIZE": 2048, "BLOCK": 2048})


if __name__ == "__main__":
    main()
