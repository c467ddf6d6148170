"""A dense llama model too small to say anything, for everything that training does to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from tests import tiny_gguf
from training.coactivation import firing, walk_layers
from training.llama import Dense
from training.split import Split, balanced_clusters, split_layer
from training.student import Student, make_student
from training.teacher import load_teacher

LAYERS = 2
PAIRS, NEURONS = 2, 4  # 2 slices of 8 neurons
RANKS = (2,) * 7


def tiny_teacher(folder: Path) -> Dense:
    """The first layers of tests.tiny_gguf, with a smaller head: random logits would be extreme."""
    file = folder / "teacher.gguf"
    if not file.exists():
        tiny_gguf.write_gguf(file)
    teacher = load_teacher(file)
    shape = dataclasses.replace(teacher.shape, num_layers=LAYERS)
    return dataclasses.replace(teacher, shape=shape, embed=0.3 * teacher.embed, layers=teacher.layers[:LAYERS])


def tiny_blocks(count: int = 24, length: int = 12) -> Tensor:
    """Random tokens [N, L]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, len(tiny_gguf.TOKENS), (count, length), generator=generator)


def tiny_splits(teacher: Dense, neurons: int = NEURONS) -> list[Split]:
    """The experts of every layer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for activity in walk_layers(teacher, tiny_blocks()):
        slices = balanced_clusters(firing(activity, 0.5).T.contiguous(), PAIRS, generator)
        split = split_layer(activity, slices, PAIRS, neurons)
        found.append(Split(split.neurons.clone(), split.router.clone()))
    return found


def tiny_student(teacher: Dense, neurons: int = NEURONS, *, paired: bool = True) -> Student:
    """A student that has learned nothing yet."""
    return make_student(teacher, RANKS, tiny_splits(teacher, neurons), paired=paired)
