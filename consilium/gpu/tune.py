"""`python -m consilium.gpu.tune`: which tiles are fastest for a model's experts on this GPU.

Gate and up, and down, are measured apart, for each number of rows that a tile may have; what was found is kept in the
user's cache folder (consilium.gpu.tuned). Kernels are compiled by several processes first: that takes most of the time.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton

from consilium.gpu.experts import ExpertForm, compute, down, gate_up
from consilium.gpu.samples import Layer, Tokens, random_layer, random_tokens
from consilium.gpu.sort import Groups, sort_pairs
from consilium.gpu.tiling import Batch, Blocks, Tiling, Tilings, batch_of
from consilium.gpu.timing import seconds_of
from consilium.gpu.tuned import keep, table_path

TOKENS = (1, 8, 32, 64, 128, 512, 4096)
FLOAT_TOKENS = (1, 64, 1024)  # what one tiling must serve
TILE_ROWS = (16, 32, 64, 128)
COLUMNS = (32, 64, 128)
MOST_QUANTIZED_WITHIN = 32  # rows of a tile; beyond that hidden rows are quantized by a kernel of their own
WIDE_TILE = 128 * 128  # of what a program sums up, gate and up: more has no registers with four warps
LARGEST_TILE = 2 * WIDE_TILE  # nor with eight


@dataclass(frozen=True, slots=True)
class Timed:
    """One way, and the seconds that it took for each number of tokens."""

    blocks: Blocks
    quantize_first: bool
    seconds: list[float]


def candidates(form: ExpertForm, block_m: int, products: int) -> list[Blocks]:
    """Ways for ``products`` at once (gate and up are two) that may be good."""
    found = []
    for n in COLUMNS:
        for k in (64, 128, 256) if form.rows is torch.int8 else (32, 64, 128):
            # With three stages of 32 KiB two programs share a multiprocessor: one multiplies while the other one ends.
            stages = 4 if k * (block_m + n * products) * form.weights.itemsize < 2**15 else 3
            if block_m * n * products <= LARGEST_TILE and k * n <= 2**14 and k <= 2 * form.hidden_size:
                found += [Blocks(n, k, warps, stages) for warps in _warps(form, block_m * n * products)]
    return found


def _warps(form: ExpertForm, sums: int) -> tuple[int, ...]:
    """Of a program that sums up so much: at most 128 registers of a thread are for that."""
    if sums < WIDE_TILE:
        return (4,)
    return (4, 8) if sums == WIDE_TILE and form.rows is torch.int8 else (8,)


def tilings_to_compile(form: ExpertForm) -> list[Tiling]:
    """Together they have every kernel that is timed."""
    found = []
    for block_m in TILE_ROWS:
        first, second = candidates(form, block_m, 2), candidates(form, block_m, 1)
        found += [Tiling(block_m, blocks, second[0], quantize_first=True) for blocks in first]
        for apart in _ways(form, block_m):
            found += [Tiling(block_m, first[0], blocks, apart) for blocks in second]
    return found


def compile_some(form: ExpertForm, tilings: Sequence[Tiling]) -> int:
    """Leave kernels in Triton's cache, for other processes; how many ways could not be compiled."""
    device = torch.device("cuda")
    layer = random_layer(form, 1, device)
    tokens = random_tokens(layer, 1, 1)[0]
    failed = 0
    for tiling in tilings:
        try:
            _run(layer, tiling, tokens)
        except triton.runtime.errors.OutOfResources:  # more shared memory than there is
            failed += 1
    torch.cuda.synchronize()
    return failed


def _run(layer: Layer, tiling: Tiling, tokens: Tokens) -> None:
    groups = sort_pairs(tokens.ids, layer.table, tiling.block_m)
    compute(layer.form, tiling, layer.table, groups, tokens.rows, tokens.scales, _room(layer, tokens))


def _room(layer: Layer, tokens: Tokens) -> torch.Tensor:
    pairs = tokens.ids.numel()
    return torch.empty(pairs, layer.form.hidden_size, dtype=layer.form.replies, device=tokens.ids.device)


def tune(
    layer: Layer,
    per_token: int,
    sizes: Sequence[int],
    tell: Callable[[str], object],
    save: Callable[[Tilings], object],
) -> None:
    """For integers the best tiling for each number of tokens, for floats one for all; saved as they are found."""
    experts = len(layer.experts)
    batches = [batch_of(size * per_token, experts) for size in sizes]
    together = (
        [(batches, sizes)]
        if layer.form.rows is not torch.int8
        else [([batch], [size]) for batch, size in zip(batches, sizes, strict=True)]
    )
    found: list[tuple[Batch, Tiling]] = []
    for some, counts in together:
        tiling, seconds = _best(layer, per_token, counts)
        found.append((some[0], tiling))
        tell(f"{'/'.join(map(str, counts))} tokens: {tiling}, {'/'.join(f'{each * 1e6:.0f}' for each in seconds)} us")
        save(found)


def _best(layer: Layer, per_token: int, counts: Sequence[int]) -> tuple[Tiling, list[float]]:
    """The tiling with the lowest product of its times, and those."""
    samples = [random_tokens(layer, count, per_token) for count in counts]
    rows = batch_of(max(counts) * per_token, len(layer.experts)).rows
    least = math.inf
    for block_m in TILE_ROWS:
        if block_m > TILE_ROWS[0] and block_m > 4 * rows:
            continue  # mostly empty
        first = _fastest(
            [_time_gate_up(layer, block_m, blocks, samples) for blocks in candidates(layer.form, block_m, 2)]
        )
        second = _fastest(
            [
                _time_down(layer, block_m, blocks, samples, apart)
                for blocks in candidates(layer.form, block_m, 1)
                for apart in _ways(layer.form, block_m)
            ]
        )
        seconds = [one + other for one, other in zip(first.seconds, second.seconds, strict=True)]
        if math.prod(seconds) < least:
            least, chosen = math.prod(seconds), seconds
            best = Tiling(block_m, first.blocks, second.blocks, second.quantize_first)
    return best, chosen


def _ways(form: ExpertForm, block_m: int) -> tuple[bool, ...]:
    if form.rows is not torch.int8:
        return (False,)
    return (False, True) if block_m <= MOST_QUANTIZED_WITHIN else (True,)


def _fastest(timed: Sequence[Timed]) -> Timed:
    return min(timed, key=lambda each: math.prod(each.seconds))


Grouped = tuple[Tokens, Groups]


def _grouped(layer: Layer, block_m: int, samples: Sequence[Sequence[Tokens]]) -> list[list[Grouped]]:
    return [[(each, sort_pairs(each.ids, layer.table, block_m)) for each in some] for some in samples]


def _time_gate_up(layer: Layer, block_m: int, blocks: Blocks, samples: Sequence[Sequence[Tokens]]) -> Timed:
    seconds = []
    for some in _grouped(layer, block_m, samples):
        calls = [
            partial(gate_up, layer.form, blocks, layer.table, groups, tokens.rows, tokens.scales)
            for tokens, groups in some
        ]
        seconds.append(_seconds(calls, layer))
    return Timed(blocks, False, seconds)


def _time_down(
    layer: Layer, block_m: int, blocks: Blocks, samples: Sequence[Sequence[Tokens]], quantize_first: bool
) -> Timed:
    seconds, usual = [], candidates(layer.form, block_m, 2)[0]
    for some in _grouped(layer, block_m, samples):
        calls = []
        for tokens, groups in some:
            hidden, largest = gate_up(layer.form, usual, layer.table, groups, tokens.rows, tokens.scales)
            given = (None if quantize_first else largest, _room(layer, tokens))
            calls.append(partial(down, layer.form, blocks, layer.table, groups, hidden, *given))
        seconds.append(_seconds(calls, layer))
    return Timed(blocks, quantize_first, seconds)


def _seconds(calls: Sequence[Callable[[], object]], layer: Layer) -> float:
    try:
        return seconds_of(calls, layer.table.device)
    except triton.runtime.errors.OutOfResources:
        return math.inf


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = _parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = torch.int8 if options.quantization == "int8" else torch.bfloat16
    weights = torch.bfloat16 if options.quantization == "none" else torch.int8
    form = ExpertForm(options.hidden, options.expert_size, rows, weights, torch.bfloat16)
    if device.type == "cuda":
        tilings = tilings_to_compile(form)
        processes = max(1, min(16, os.cpu_count() or 1, len(tilings)))
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            failed = pool.starmap(compile_some, [(form, tilings[place::processes]) for place in range(processes)])
        print(f"compiled {len(tilings)} ways, {sum(failed)} of which take too much shared memory", flush=True)
    with torch.inference_mode():
        layer = random_layer(form, options.experts, device)
        sizes = options.tokens or (TOKENS if rows is torch.int8 else FLOAT_TOKENS)
        tune(layer, options.top_k, sizes, partial(print, flush=True), partial(keep, form, device))
    print(f"kept in {table_path(device)}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m consilium.gpu.tune", description=__doc__)
    parser.add_argument("--quantization", choices=("int8", "int8-weight-only", "none"), default="int8")
    parser.add_argument("--hidden", type=int, default=2048, metavar="D")
    parser.add_argument("--expert-size", type=int, default=768, metavar="F")
    parser.add_argument("--experts", type=int, default=128, metavar="E")
    parser.add_argument("--top-k", type=int, default=8, metavar="K")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help=" ".join(map(str, TOKENS)))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
