"""A section of bench.gpu: the gateway's kernels one by one, beside their floors; and which tiles suit them best.

Experts have a section of their own (bench.gpu_experts). Weights, and keys and values, are those of other layers in
turn, so that no cache has them.

Letters: T rows of the step, D hidden size, H heads, d head size, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

from bench import gpu_experts
from bench.gpu_experts import ceilings
from consilium.checkpoint import Checkpoint
from consilium.gpu.linear import TILES, Tile, linear
from consilium.gpu.norm import new_rows, rms_norm
from consilium.gpu.timing import seconds_of
from consilium.model_config import ModelConfig
from consilium.models import resolve_model
from consilium.quantization import Quantized
from gateway.batch import Segment, StepRows
from gateway.gpu.attention import attend
from gateway.gpu.batch import DeviceStep, numbers_of, shape_of, to_device, view
from gateway.gpu.combine import combine
from gateway.gpu.gate import route
from gateway.gpu.heads import HeadNorms, prepare
from gateway.gpu.layer import head_shape
from gateway.gpu.pages import PagePool
from gateway.gpu.sampling import largest
from gateway.gpu.tiling import FAST, INVARIANT, Tiling

SHOWN = 4  # of the tiles that were tried


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model, and of what is asked of it."""

    model: str
    layers: int  # in turn
    memory: int  # bytes for keys and values
    context: int  # positions before those of a decoding step
    batches: tuple[int, ...]  # rows of decoding steps
    prompt: int  # rows of one more step
    tiles: tuple[Tile, ...]  # of dense products
    decoding: tuple[Tiling, ...]  # of attention
    prompts: tuple[Tiling, ...]


QWEN3 = Sizes(
    "shape:qwen3-30b-a3b",
    6,
    24 * 2**30,
    1024,
    (1, 32, 128),
    4096,
    (
        *TILES.values(),
        Tile(16, 32, 256, 4, 4),
        Tile(16, 16, 256, 4, 4),
        Tile(32, 32, 256, 4, 4),
        Tile(64, 16, 256, 4, 4),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 64, 128, 4, 3),
    ),
    (*INVARIANT[:1], *FAST[:1], Tiling(stages=2), Tiling(chunk=128), Tiling(rows=16), Tiling(rows=16, keys=32)),
    (*INVARIANT[1:], *FAST[1:], Tiling(stages=2), Tiling(chunk=512), Tiling(rows=128, chunk=1024, warps=8)),
)
TOY = Sizes("shape:tiny,layers=2", 1, 2**22, 20, (2,), 20, (Tile(16, 16, 32, 4, 3),), (INVARIANT[0],), (INVARIANT[1],))


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel, for the layers in turn; and the least that one call of it must do."""

    calls: Sequence[Callable[[], object]]
    moved: int  # bytes
    operations: Mapping[str, int] = field(default_factory=dict)  # of matrix units, by what they multiply


class Kernels:
    """What one step launches: each kernel with tensors of its sizes."""

    def __init__(self, config: ModelConfig, pool: PagePool, sizes: Sizes, rows: int, device: torch.device) -> None:
        self._config, self._pool, self._sizes, self._rows, self._device = config, pool, sizes, rows, device
        self.prompt = rows == sizes.prompt
        self._first = 0 if self.prompt else sizes.context
        self._shape = head_shape(config)
        self._x = torch.randn(rows, config.hidden_size, device=device)

    def works(self) -> dict[str, Work]:
        """What a layer launches beside its experts, and what comes after the last one."""
        config, x, turns = self._config, self._x, self._sizes.layers
        size = config.hidden_size
        rows, weight = new_rows(self._rows, size, self._device), torch.ones(size, device=self._device)
        found = {
            "norm": Work([partial(rms_norm, x, weight, 1e-6, rows)] * turns, x.nbytes * 5 // 4),
            "qkv": self.dense(self._shape.width, size),
            "heads": self._heads(),
            "attention": self.attention(INVARIANT[1] if self.prompt else INVARIANT[0]),
            "out": self.dense(size, config.heads_size, add=True),
            "gate": self._gate(),
            "combine": self._combine(),
        }
        if not self.prompt:
            logits = torch.randn(self._rows, config.vocab_size, device=self._device)
            found |= {
                "head": self.dense(config.vocab_size, size),
                "largest": Work([partial(largest, logits)], logits.nbytes),
            }
        return found

    def dense(self, columns: int, size: int, *, add: bool = False, tile: Tile | None = None) -> Work:
        """x [T, size] times a matrix [columns, size]; ``add`` to what is there."""
        rows, out = self._rows, torch.zeros(self._rows, columns, device=self._device)
        x, weights = self._integers(rows, size), [self._integers(columns, size) for _ in range(self._sizes.layers)]
        calls = [partial(linear, x, weight, out, None, out if add else None, tile) for weight in weights]
        return Work(
            calls, columns * size + rows * (size + columns * (8 if add else 4)), {"int8": 2 * rows * columns * size}
        )

    def attention(self, tiling: Tiling) -> Work:
        """Of all heads. Only what is not masked counts."""
        config, step, dtype = self._config, self._step(tiling), self._pool.dtype
        queries = torch.randn(self._rows, config.num_heads, config.head_dim, device=self._device).to(dtype)
        out, layers = new_rows(self._rows, config.heads_size, self._device), range(self._sizes.layers)
        calls = [partial(attend, queries, self._shape, self._pool.layer(each), step.tiles, 0, out) for each in layers]
        lengths = range(1, self._rows + 1) if self.prompt else [self._first + 1] * self._rows
        kept = max(lengths) if self.prompt else sum(lengths)
        moved = kept * self._shape.kv_heads * self._shape.size * 2 * dtype.itemsize + queries.nbytes + out.values.nbytes
        return Work(calls, moved, {"bfloat16": 4 * sum(lengths) * config.heads_size})

    def _step(self, tiling: Tiling) -> DeviceStep:
        """All rows of one prompt, or each the next one of a sequence of its own."""
        lengths = [self._rows] if self.prompt else [1] * self._rows
        caches = [self._pool.allocate(self._first + each, self._first + each) for each in lengths]
        segments = [
            Segment(cache, row, each, self._first)
            for row, (cache, each) in enumerate(zip(caches, lengths, strict=True))
        ]
        batch = StepRows(torch.zeros(self._rows, dtype=torch.int64), segments)
        shape = shape_of(batch, tiling, self._shape, graph=not self.prompt)
        step = view(to_device(numbers_of(batch, shape), self._device), shape)
        for cache in caches:
            self._pool.free(cache)
        return step

    def _heads(self) -> Work:
        step, shape, d = self._step(INVARIANT[0]), self._shape, self._shape.size
        qkv = torch.randn(len(step.positions), shape.width, device=self._device)
        norms = HeadNorms(torch.ones(d, device=self._device), torch.ones(d, device=self._device), whole=False)
        turns = torch.randn(self._first + self._rows, shape.rotated // 2, device=self._device)
        queries = torch.empty(len(qkv), shape.heads, d, dtype=self._pool.dtype, device=self._device)
        given = qkv, shape, norms, (turns, turns), step.positions, step.slots
        layers = range(self._sizes.layers)
        return Work([partial(prepare, *given, self._pool.layer(each), queries) for each in layers], qkv.nbytes * 3 // 2)

    def _gate(self) -> Work:
        config, device = self._config, self._device
        ids = torch.empty(self._rows, config.top_k, dtype=torch.int32, device=device)
        weights = torch.empty(self._rows, config.top_k, device=device)
        gates = [torch.randn(config.num_experts, config.hidden_size, device=device) for _ in range(self._sizes.layers)]
        calls = [partial(route, self._x, gate, normalize=True, ids=ids, weights=weights) for gate in gates]
        return Work(calls, gates[0].nbytes + self._x.nbytes)

    def _combine(self) -> Work:
        config, rows = self._config, self._rows * self._config.top_k
        outputs = torch.randn(rows, config.hidden_size, device=self._device).bfloat16()
        weights = torch.rand(self._rows, config.top_k, device=self._device)
        calls = [partial(combine, torch.zeros_like(self._x), outputs, weights)] * self._sizes.layers
        return Work(calls, outputs.nbytes + 2 * self._x.nbytes)

    def _integers(self, rows: int, size: int) -> Quantized:
        values = torch.randint(-127, 128, (rows, size), dtype=torch.int8, device=self._device)
        return Quantized(values, torch.full((rows,), size**-0.5 / 73, device=self._device))


def run(toy: bool, console: Console, keep: Callable[[Mapping[str, Any]], None]) -> None:
    """Bits are checked elsewhere: tests/gpu, and the section of whole models."""
    sizes, device = TOY if toy else QWEN3, torch.device("cpu" if toy else "cuda")
    best = ceilings(gpu_experts.TOY if toy else gpu_experts.QWEN3, device)
    config = Checkpoint(resolve_model(sizes.model)).config
    pool = PagePool(config, torch.float32 if toy else torch.bfloat16, sizes.memory, device)
    for layer in range(sizes.layers):
        for tensor in pool.layer(layer):
            tensor.normal_()
    steps = {rows: Kernels(config, pool, sizes, rows, device) for rows in (*sizes.batches, sizes.prompt)}
    kernels = {
        rows: {name: beside_floor(work, best, device) for name, work in step.works().items()}
        for rows, step in steps.items()
    }
    keep({"ceilings": best, "kernels": kernels})
    console.print(kernel_table(kernels))
    tiles = dict[str, dict[str, float]]()
    for rows, step in steps.items():
        for name, found in ranked_tiles(step, config, sizes, device).items():
            tiles[f"{name}, {rows} rows"] = found
            best_ones = [f"{seconds * 1e6:.1f} us {tile}" for tile, seconds in list(found.items())[:SHOWN]]
            console.print(f"{name}, {rows} rows: {'; '.join(best_ones)}")
        keep({"tiles": tiles})


def ranked_tiles(step: Kernels, config: ModelConfig, sizes: Sizes, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of a call with each of the tiles that can be launched, the fastest first."""
    matrices = {
        "qkv": (head_shape(config).width, config.hidden_size),
        "out": (config.hidden_size, config.heads_size),
    }
    tilings = sizes.prompts if step.prompt else sizes.decoding
    ways = {"attention": {str(each): partial(step.attention, each) for each in tilings}}
    for name, matrix in matrices.items():
        ways[name] = {str(each): partial(step.dense, *matrix, tile=each) for each in sizes.tiles}
    found = dict[str, dict[str, float]]()
    for name, some in ways.items():
        seconds = {tile: fastest(way, device) for tile, way in some.items()}
        found[name] = {
            tile: seconds[tile] for tile in sorted(seconds, key=lambda each: seconds[each]) if seconds[tile] < math.inf
        }
    return found


def beside_floor(work: Work, best: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds of one call, and the least that this device could take."""
    rates = best["operations_per_second"]
    least = [work.moved / best["bytes_per_second"], *(each / rates[unit] for unit, each in work.operations.items())]
    return {"seconds": seconds_of(work.calls, device), "floor_seconds": max(least)}


def fastest(make: Callable[[], Work], device: torch.device) -> float:
    """Seconds of one call; infinite where a tile takes more than there is."""
    try:
        return seconds_of(make().calls, device)
    except triton.runtime.errors.OutOfResources:
        return math.inf


def kernel_table(kernels: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Table:
    """Times in us beside their floors."""
    table = Table(
        title="kernels beside the experts", box=box.SIMPLE_HEAD, caption="us of a call (floor), by rows of the step"
    )
    for heading in ("", *map(str, kernels)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in next(iter(kernels.values())):
        cells = [
            f"{found[name]['seconds'] * 1e6:.1f} ({found[name]['floor_seconds'] * 1e6:.1f})" if name in found else ""
            for found in kernels.values()
        ]
        table.add_row(name, *cells)
    return table
