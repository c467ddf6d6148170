"""What the serving policies cost and save: perplexity against experts called, on a text, all in one process.

Experts called are those of a token; experts read are different ones in a batch of 16 tokens, each of another place in
the text, which is what a decoding step of 16 sequences reads from memory. `capacity_factor` sees whole windows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.report import write
from consilium.arithmetics import find_arithmetic as find_expert_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.config import AdaptiveK, Config
from consilium.errors import ConsiliumError
from consilium.models import resolve_model
from consilium.quantize.text import encode_text, read_text
from gateway.arithmetic import find_arithmetic
from gateway.batch import Segment
from gateway.batches import ExpertBatches, ExpertOutputs, experts_of_tokens
from gateway.evaluation import split_windows
from gateway.gate_policy import GatePolicy
from gateway.kv_cache import BLOCK, KVPool, blocks_for
from gateway.local_experts import LocalExperts, run_now
from gateway.model import Model

BATCH = 16


class Counting:
    """An ExpertSource that counts what is asked of another one."""

    def __init__(self, experts: LocalExperts) -> None:
        self._experts = experts
        self.called = self.tokens = self.read = self.batches = 0

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        chosen = experts_of_tokens(batches)  # [T, K]
        self.called += len(batches.slots)
        self.tokens += len(chosen)
        apart = max(1, len(chosen) // BATCH)
        for first in range(apart):
            rows = chosen[first::apart]
            if len(rows) >= BATCH:
                self.read += len(np.unique(rows[:BATCH][rows[:BATCH] >= 0]))
                self.batches += 1
        return await self._experts.dispatch(layer, batches)


def measure(checkpoint: Checkpoint, policy: GatePolicy | None, windows: Sequence[Sequence[int]]) -> dict[str, float]:
    """One policy over all windows, in int8."""
    config, settings = checkpoint.config, Config()
    of_experts = find_expert_arithmetic("int8", settings.reply_dtype, config.hidden_size, config.expert_size)
    counting = Counting(LocalExperts(checkpoint, of_experts))
    model = Model(checkpoint, find_arithmetic(settings, config), counting, policy=policy)
    loss, positions = 0.0, 0
    for window in windows:
        pool = KVPool(config, torch.float32, blocks_for(len(window)) * BLOCK * 4 * config.cached_elements)
        segment = Segment(pool.allocate(len(window), len(window)), 0, len(window), 0)
        logits = model.logits(run_now(model.forward(model.batch(list(window), [segment]))))[:-1]
        expected = torch.tensor(window[1:])
        loss -= float(logits.log_softmax(-1).gather(1, expected[:, None]).double().sum())
        positions += len(expected)
    changes = policy.take() if policy is not None else {}
    pairs = counting.tokens * config.top_k
    return {
        "perplexity": float(np.exp(loss / positions)),
        "experts_per_token": counting.called / counting.tokens,
        "experts_read_per_16_tokens": counting.read / max(1, counting.batches),
        **{f"{change}_share": count / pairs for change, count in changes.items()},
    }


def policies(checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[tuple[str, GatePolicy | None]]:
    """The gate as it is, then each policy."""
    yield "the gate as it is", None
    for mass in options.mass:
        yield f"adaptive_k mass {mass:g}", GatePolicy(checkpoint.config, AdaptiveK(mass=mass), None)
    if checkpoint.config.gate.scores in ("softmax", "sigmoid"):
        for factor in options.capacity:
            yield f"capacity_factor {factor:g}", GatePolicy(checkpoint.config, None, factor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status."""
    options = _parse(arguments)
    try:
        path = resolve_model(options.model)
        checkpoint = Checkpoint(path)
        tokens = encode_text(path, checkpoint.config.vocab_size, read_text(options.text), 2, options.tokens)
        with torch.inference_mode():
            windows = list(split_windows(tokens, options.window))
            found = {name: measure(checkpoint, policy, windows) for name, policy in policies(checkpoint, options)}
    except ConsiliumError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(found)
    settings: dict[str, Any] = {**vars(options), "text": options.text.name}
    print(f"written to {write(options.name, describe(), settings, found)}")
    return 0


def _print(found: dict[str, dict[str, float]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for heading in ("perplexity", "experts a token", f"read by {BATCH} tokens", "moved", "over"):
        table.add_column(heading, justify="right")
    for name, each in found.items():
        shares = [f"{each[key]:.1%}" if key in each else "" for key in ("moved_share", "over_share")]
        counts = f"{each['experts_per_token']:.2f}", f"{each['experts_read_per_16_tokens']:.2f}"
        table.add_row(name, f"{each['perplexity']:.3f}", *counts, *shares)
    Console().print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gate_policies", description=__doc__)
    parser.add_argument("--model", default="default", help="folder, name or shape; default")
    parser.add_argument("--text", type=Path, required=True, help="a text, UTF-8")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens seen at once")
    parser.add_argument("--mass", type=float, nargs="*", default=[0.5, 0.7, 0.8, 0.9, 0.95], metavar="P")
    parser.add_argument("--capacity", type=float, nargs="*", default=[1.0, 1.25, 1.5, 2.0], metavar="F")
    parser.add_argument("--name", default="gate_policies", help="of the result, bench/results/NAME.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
