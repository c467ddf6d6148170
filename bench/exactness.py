"""What the fixed orders cost: the engine's model with its own kernels, and with torch's in their place.

`python -m bench.exactness` prints a table and writes bench/results/exactness.json. Everything runs in this process,
experts included, so that only the kernels differ. "fixed order" is what is served; "free order" has torch's attention
(scaled_dot_product_attention over the same cache), torch's gate and torch's RMS norm, which may sum in any order.
The int8 products are exact in either, and have no faster inexact form here; float32 in the last column is `none` with
torch's plain linear layers, whose bits depend on the batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as nn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.machine import describe
from bench.report import write
from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import Config, Quantization
from consilium.gate import Routing, softmax_top_k
from consilium.integer_product import find_integer_product
from consilium.models import resolve_model
from consilium.rope import apply_rope
from gateway.arithmetic import Arithmetic
from gateway.attention import Attention
from gateway.batch import Batch, Segment
from gateway.fused_attention import FusedAttention
from gateway.gate import Gate
from gateway.kv_cache import BLOCK, KVPool, blocks_for
from gateway.linear import FloatLinear
from gateway.local_experts import LocalExperts, run_now
from gateway.model import Model
from gateway.norm import RMSNorm

# Name, sequences, positions before the step, rows of each.
LOADS = (
    ("1 sequence", 1, 100, 1),
    ("8 sequences", 8, 100, 1),
    ("32 sequences", 32, 100, 1),
    ("1 sequence of 1000", 1, 1000, 1),
    ("a prompt of 512", 1, 0, 512),
)


def free_attention(self: Attention, x: Tensor, batch: Batch) -> Tensor:
    """Attention.forward with torch's kernels over the same cache."""
    (heads, kv_heads, size, *_), (qkv, projection) = self.heads.shape, self.projections
    sizes = [each * size for each in (heads, kv_heads, kv_heads)]
    q, k, v = (part.view(len(x), -1, size) for part in qkv.forward(x).float().split(sizes, dim=1))
    q, k = apply_rope(q, batch.cos, batch.sin), apply_rope(k, batch.cos, batch.sin)
    out = torch.empty_like(q)
    for segment in batch.segments:
        rows = slice(segment.row, segment.row + segment.length)
        out[rows] = _attend(self, segment, q[rows], k[rows], v[rows])
    return projection.forward(out.flatten(1))


def _attend(self: Attention, segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    start, stop = segment.position, segment.position + segment.length
    keys, values = (each[self.heads.layer] for each in segment.tensors)
    positions = torch.arange(start, stop)
    keys[:, positions // BLOCK, :, positions % BLOCK] = k
    values[:, start:stop] = v.transpose(0, 1)
    keys = keys[:, : blocks_for(stop)].transpose(2, 3).flatten(1, 2)[None, :, :stop]  # [1, Hkv, S, d]
    values = values[None, :, :stop]
    if segment.length == 1:
        groups = q.view(1, keys.shape[1], -1, q.shape[2])  # [1, Hkv, H / Hkv, d]
        return nn.scaled_dot_product_attention(groups, keys, values).view(q.shape)
    mask = torch.arange(stop)[None, :] <= positions[:, None]
    out = nn.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def free_route(self: Gate, x: Tensor) -> Routing:
    """Gate.route with torch's kernels."""
    logits = x @ self.matrix[:, : self._num_experts]
    return softmax_top_k(logits, self._top_k, normalize=self._rule.normalize)


@contextmanager
def free_order(*, linear: bool) -> Iterator[None]:
    """torch's kernels in place of ours."""

    def norm(self: RMSNorm, x: Tensor) -> Tensor:
        return nn.rms_norm(x, x.shape[1:], self._weight, self._eps)

    def plain(self: FloatLinear, x: Tensor) -> Tensor:
        return nn.linear(x, self._weight, self._bias)

    with ExitStack() as stack:
        for owner, name, other in (
            (Attention, "forward", free_attention),
            (FusedAttention, "takes", lambda self, rows: False),  # noqa: ARG005 (the method's)
            (Gate, "route", free_route),
            (RMSNorm, "forward", norm),
            *([(FloatLinear, "forward", plain)] if linear else []),
        ):
            stack.enter_context(patch.object(owner, name, other))
        yield


def step_seconds(model: Model, checkpoint: Checkpoint, load: tuple[str, int, int, int], steps: int) -> float:
    """The best time of a step with its logits."""
    _, sequences, before, rows = load
    pool = KVPool(checkpoint.config, torch.float32, 2**31)
    caches = [pool.allocate(before + rows, before + rows) for _ in range(sequences)]
    for cache in caches:  # what was there before: anything finite
        cache.keys.fill_(0.01)
        cache.values.fill_(0.01)
    best = float("inf")
    for _ in range(steps):
        start = time.perf_counter()
        segments = [Segment(cache, index * rows, rows, before) for index, cache in enumerate(caches)]
        hidden = run_now(model.forward(model.batch([1] * (rows * sequences), segments)))
        model.logits(hidden[rows - 1 :: rows])
        best = min(best, time.perf_counter() - start)
    return best


def measure(checkpoint: Checkpoint, steps: int) -> list[dict[str, Any]]:
    """Seconds of each load in each of the three ways, which take turns."""
    product = find_integer_product()

    def model(experts: Quantization, arithmetic: Arithmetic) -> Model:
        config = checkpoint.config
        dtype = Config(quantization=experts).reply_dtype
        source = LocalExperts(checkpoint, find_arithmetic(experts, dtype, config.hidden_size, config.expert_size))
        return Model(checkpoint, arithmetic, source)

    int8 = model("int8", Arithmetic(torch.float32, product, product))
    floats = model("none", Arithmetic(torch.float32))
    figures = []
    for load in LOADS:

        def run(served: Model, load: tuple[str, int, int, int] = load) -> Callable[[], float]:
            return lambda: step_seconds(served, checkpoint, load, steps)

        found: dict[str, float] = {"fixed order": run(int8)(), "none, fixed order": run(floats)()}
        with free_order(linear=False):
            found["free order"] = run(int8)()
        with free_order(linear=True):
            found["none, free order"] = run(floats)()
        figures.append({"load": load[0], "seconds": found})
    return figures


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--steps", type=int, default=12, help="of each load; the best counts")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe()
    with torch.inference_mode():
        figures = measure(Checkpoint(resolve_model(options.model)), options.steps)
    table = Table("step of", *figures[0]["seconds"], caption="ms, experts and head included")
    for each in figures:
        table.add_row(each["load"], *(f"{seconds * 1e3:.1f}" for seconds in each["seconds"].values()))
    Console().print(table)
    print(f"written to {write('exactness', machine, vars(options), figures)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
