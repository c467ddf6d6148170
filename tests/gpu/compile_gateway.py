"""Compiles the gateway's kernels for a Hopper GPU at Qwen3-30B-A3B's sizes: ``python -m tests.gpu.compile_gateway``.

Prints warps and bytes of shared memory of each. A program of its own: a process either interprets or compiles.
"""

from __future__ import annotations

import torch

from consilium.gpu.linear import TILES, linear
from consilium.gpu.norm import activate, new_rows, rms_norm
from consilium.quantization import Quantized
from gateway.gpu.attention import attend
from gateway.gpu.combine import combine
from gateway.gpu.gate import route
from gateway.gpu.heads import HeadNorms, HeadShape, prepare
from gateway.gpu.pages import PAGE, LayerPages
from gateway.gpu.sampling import draw, largest
from gateway.gpu.tiling import FAST, FLOAT32, INVARIANT, TILE, Tiles, Tiling
from tests.gpu.compile_only import compiling

CPU = torch.device("cpu")
HIDDEN, EXPERTS, TOP_K, VOCABULARY = 2048, 128, 8, 151936
SHAPE = HeadShape(heads=32, kv_heads=4, size=128, rotated=128, epsilon=1e-6)
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on Hopper


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def rows_and_products(rows: int) -> None:
    """Norm, products and activation."""
    x = torch.empty(rows, HIDDEN)
    quantized = new_rows(rows, HIDDEN, CPU)
    rms_norm(x, torch.empty(HIDDEN), 1e-6, quantized, x)
    weight = Quantized(torch.empty(64, HIDDEN, dtype=torch.int8), torch.empty(64))
    linear(quantized, weight, torch.empty(rows, 64))
    odd = HIDDEN + 8  # no multiple of what is summed up at a time
    given = new_rows(rows, odd, CPU), Quantized(torch.empty(64, odd, dtype=torch.int8), torch.empty(64))
    linear(*given, torch.empty(rows, 64), torch.empty(64), torch.empty(rows, 64))
    activate(torch.empty(rows, 2 * 768), new_rows(rows, 768, CPU))


def heads(dtype: torch.dtype) -> None:
    """What comes before attention, with norms of each head and of all."""
    pages, queries = keys_and_values(dtype), torch.empty(2, SHAPE.heads, SHAPE.size, dtype=dtype)
    turns = torch.empty(64, SHAPE.rotated // 2)
    for whole in (False, True):
        of_queries, of_keys = (count * SHAPE.size if whole else SHAPE.size for count in (SHAPE.heads, SHAPE.kv_heads))
        norms = HeadNorms(torch.empty(of_queries), torch.empty(of_keys), whole)
        prepare(torch.empty(2, SHAPE.width), SHAPE, norms, (turns, turns), ints(2), ints(2), pages, queries)


def attention(tiling: Tiling, dtype: torch.dtype, window: int, *, split: bool) -> None:
    """Both kernels of attention."""
    queries, chunks = torch.empty(2, SHAPE.heads, SHAPE.size, dtype=dtype), 2
    tiles = Tiles(ints(2, TILE), ints(2, 8), ints(2), chunks, split, tiling)
    attend(queries, SHAPE, keys_and_values(dtype), tiles, window, new_rows(2, SHAPE.heads * SHAPE.size, CPU))


def keys_and_values(dtype: torch.dtype) -> LayerPages:
    """Four pages."""
    return LayerPages(*(torch.empty(4, SHAPE.kv_heads, PAGE, SHAPE.size, dtype=dtype) for _ in range(2)))


def gate(rows: int) -> None:
    """From the normed rows to experts."""
    ids, weights = ints(rows, TOP_K), torch.empty(rows, TOP_K)
    route(torch.empty(rows, HIDDEN), torch.empty(EXPERTS, HIDDEN), normalize=True, ids=ids, weights=weights)


def combining_and_sampling() -> None:
    """From experts' outputs to the stream, and from logits to tokens."""
    x, weights = torch.empty(2, HIDDEN), torch.empty(2, TOP_K)
    for dtype in (torch.bfloat16, torch.float32):
        combine(x, torch.empty(2 * TOP_K, HIDDEN, dtype=dtype), weights)
    logits = torch.empty(2, VOCABULARY)
    largest(logits)
    draw(logits, torch.empty(2), torch.empty(2, 2), torch.empty(2, dtype=torch.float64))


def main() -> None:
    """Compile everything once."""
    with compiling() as found:
        for rows in (1, 40, 100, 300):
            rows_and_products(rows)
        for rows in (2, 300):
            gate(rows)
        heads(torch.bfloat16)
        attention(INVARIANT[0], torch.bfloat16, 0, split=True)
        attention(INVARIANT[1], torch.bfloat16, 4096, split=False)
        attention(FAST[0], torch.bfloat16, 0, split=True)
        attention(FAST[1], torch.bfloat16, 0, split=False)
        attention(FLOAT32[0], torch.float32, 0, split=True)
        combining_and_sampling()
    assert len(TILES) == 4, "a product for every tile"
    for each in found:
        ptx = each.asm["ptx"]
        if each.metadata.shared > SHARED_MEMORY:
            raise ValueError(f"{each.name} takes {each.metadata.shared} bytes of shared memory")
        if "fma.rn.f32" in ptx and each.name not in ("_logits", "_choose", "_attend", "_merge"):
            raise ValueError(f"{each.name} does not keep multiplies and adds apart")
        print(each.name, each.metadata.num_warps, each.metadata.shared, flush=True)


if __name__ == "__main__":
    main()
