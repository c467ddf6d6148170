"""What each switch of the gate does, measured: `python -m training.switches TEACHER TEXT`, minutes on a CPU.

The first layers of a real llama model and its commonest tokens are small enough for that. Each run starts from the same
split with gates that are free and learn fast, so that they would drift apart; one switch at a time holds them.
Prints a table and writes training/results/switches.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from training.blocks import cut_blocks
from training.coactivation import firing, walk_layers
from training.distill import Distillation, TrainingError
from training.gates import GateOptions
from training.llama import Dense, hidden_states
from training.losses import distillation, next_tokens
from training.settings import DistillSettings
from training.split import Split, balanced_clusters, split_layer
from training.student import Student, make_student, student_states
from training.teacher import load_teacher
from training.texts import read_documents, tokenizer_of

LAYERS, VOCABULARY, BLOCK = 2, 4096, 64
PAIRS, NEURONS, TOP_K = 8, 96, 8  # half of the dense neurons at a time, so that the choice matters
HELD_OUT = 24  # blocks
SWITCHES: dict[str, dict[str, float]] = {
    "none": {},
    "auxiliary loss, 1": {"aux_weight": 1.0},
    "auxiliary loss, 10": {"aux_weight": 10.0},
    "z-loss, 0.1": {"z_weight": 0.1},
    "noise, 0.3": {"noise": 0.3},
    "bias, 0.02": {"bias_rate": 0.02},
    "capacity, 1.25": {"capacity": 1.25},
}
FILE = Path(__file__).with_name("results") / "switches.json"


def measured(teacher: Dense, splits: list[Split], blocks: Tensor, options: GateOptions, steps: int) -> dict[str, float]:
    """Figures on held-out blocks [N, L]: with the gate as it learned, and as Mixtral serves it, without a bias."""
    student = make_student(teacher, (8,) * 7, splits, paired=False)
    settings = DistillSettings(steps, 4, learning_rate=1e-3, gate_rate=1e-3, report_every=steps, gate=options)
    with contextlib.suppress(TrainingError):  # a collapse is a result here: it is seen in the loads
        list(Distillation(student, teacher, blocks[HELD_OUT:], settings).run())
    learned = _figures(student, teacher, blocks[:HELD_OUT])
    for layer in student.layers:
        if layer.router is not None:
            layer.router.bias.zero_()
    served = _figures(student, teacher, blocks[:HELD_OUT])
    return learned | {f"served_{name}": figure for name, figure in served.items()}


@torch.no_grad()
def _figures(student: Student, teacher: Dense, blocks: Tensor) -> dict[str, float]:
    """Divergence in nats; loads in even shares; the largest weight of a token's experts (even: 1/8)."""
    states, gates = student_states(student, blocks, torch.ones(()), GateOptions(TOP_K), torch.float32)
    expected = hidden_states(teacher, blocks).flatten(0, 1)
    found = distillation(states.flatten(0, 1), expected, next_tokens(blocks), teacher.embed, 1.0)
    shares = torch.stack([gated.load for gated in gates]) * 2 * PAIRS  # [LAYERS, E]
    chosen = torch.stack([gated.mix for gated in gates])  # [LAYERS, T, E]
    return {
        "divergence": float(found.divergence) / blocks.numel(),
        "smallest_load": float(shares.min()),
        "largest_load": float(shares.max()),
        "deviation": float(shares.std(1).mean()),
        "largest_weight": float(chosen.amax(2).mean()) / TOP_K,
    }


def small_teacher(file: Path) -> Dense:
    """The first LAYERS layers, with the commonest tokens: byte-pair merges are numbered by how common they are."""
    whole = load_teacher(file)
    shape = dataclasses.replace(whole.shape, num_layers=LAYERS, vocab_size=VOCABULARY)
    return dataclasses.replace(whole, shape=shape, embed=whole.embed[:VOCABULARY], layers=whole.layers[:LAYERS])


def common_blocks(teacher: Path, text: Path) -> Tensor:
    """Blocks [N, BLOCK] of the text without its rarer tokens, in random order."""
    tokenizer = tokenizer_of(teacher)
    tokens = [id_ for each in read_documents(text) for id_ in tokenizer.encode(each).ids if id_ < VOCABULARY]
    blocks = torch.from_numpy(cut_blocks(np.array(tokens, np.uint16), BLOCK, str(text)).astype(np.int64))
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.switches", description=__doc__)
    parser.add_argument("teacher", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    teacher, blocks = small_teacher(options.teacher), common_blocks(options.teacher, options.text)
    generator, splits = torch.Generator().manual_seed(0), list[Split]()
    for activity in walk_layers(teacher, blocks[HELD_OUT : HELD_OUT + 48]):
        slices = balanced_clusters(firing(activity, 0.5)[::4].T.contiguous(), PAIRS, generator)
        found = split_layer(activity, slices, PAIRS, NEURONS)
        splits.append(Split(found.neurons.clone(), found.router.clone()))
    results = {
        name: measured(teacher, splits, blocks, GateOptions(TOP_K, **switch), options.steps)
        for name, switch in SWITCHES.items()
    }
    FILE.write_text(json.dumps({"steps": options.steps, "runs": results}, indent=1) + "\n", "utf-8")
    table = Table("switch", "divergence", "loads", "deviation", "largest weight", "served: divergence", "deviation")
    for name, each in results.items():
        loads = f"{each['smallest_load']:.2f} to {each['largest_load']:.2f}"
        keys = ("deviation", "largest_weight", "served_divergence", "served_deviation")
        table.add_row(name, f"{each['divergence']:.3f}", loads, *(f"{each[key]:.3f}" for key in keys))
    Console().print(table)


if __name__ == "__main__":
    main()
