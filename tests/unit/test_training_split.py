"""From neurons to experts, with planted structure that must be found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from consilium.errors import ConfigError
from tests.tiny_teacher import PAIRS, tiny_blocks, tiny_teacher
from training.coactivation import Activity, firing, walk_layers
from training.gates import GateOptions
from training.llama import Matrices, hidden_states
from training.split import Ridge, balanced_clusters, captured, match_evenly, random_split, split_layer, split_slice
from training.student import make_student, student_states


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_match_evenly_fills_every_cluster_and_nobody_would_rather_swap() -> None:
    nearness = torch.rand(24, 4, generator=_generator())
    nearness[:, 0] += 1  # everybody wants the first
    cluster_of = match_evenly(nearness)
    assert torch.bincount(cluster_of).tolist() == [6] * 4
    mine = nearness[torch.arange(24), cluster_of]
    for point in range(24):
        for other in range(24):
            wanted = nearness[point, cluster_of[other]]
            assert not (wanted > mine[point] and wanted > mine[other]), (point, other)


def test_neurons_that_fire_together_end_in_one_cluster() -> None:
    kinds = torch.randint(0, 3, (200,), generator=_generator())  # of tokens
    points = torch.stack([(kinds == neuron % 3).float() for neuron in range(12)])
    cluster_of = balanced_clusters(points, 3, _generator())
    for kind in range(3):
        assert len(set(cluster_of[kind::3].tolist())) == 1


def test_an_ffn_that_does_not_split_evenly_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 neurons cannot be shared evenly by 4 slices"):
        balanced_clusters(torch.rand(10, 5), 4, _generator())


def test_a_slice_learns_which_neurons_matter_when_and_which_always_do() -> None:
    inputs = torch.randn(400, 5, generator=_generator())
    positive = (inputs[:, 2] > 0).float()
    energy = 0.01 * torch.rand(400, 6, generator=_generator())
    energy[:, :2] += 1  # always
    energy[:, 2:4] += positive[:, None]
    energy[:, 4:] += 1 - positive[:, None]
    plus, minus, direction = split_slice(energy, inputs, Ridge(inputs), 4)
    assert sorted((plus.tolist(), minus.tolist())) == [[0, 1, 2, 3], [0, 1, 4, 5]]
    predicted = inputs @ direction > 0
    agreement = float((predicted == positive.bool()).float().mean())
    assert max(agreement, 1 - agreement) > 0.95


def test_experts_found_keep_more_than_experts_dealt_out(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    for activity in walk_layers(teacher, tiny_blocks()):
        slices = balanced_clusters(firing(activity, 0.5).T.contiguous(), PAIRS, _generator())
        split = split_layer(activity, slices, PAIRS, 6)
        assert split.neurons.shape == (4, 6)
        for plus, minus in split.neurons.view(PAIRS, 2, 6).tolist():
            assert len(set(plus)) == len(set(minus)) == 6
        assert captured(activity, split) > captured(activity, random_split(activity, PAIRS, 6, _generator()))


def test_a_student_with_all_neurons_in_both_of_a_pair_is_the_teacher(tmp_path: Path) -> None:
    teacher, tokens = tiny_teacher(tmp_path), tiny_blocks(2)
    splits = []
    for activity in walk_layers(teacher, tokens):
        found = random_split(activity, PAIRS, 8, _generator())
        splits.append(found._replace(neurons=found.neurons.clone(), router=1e-4 * found.router))
    student = make_student(teacher, (1,) * 7, splits)
    with torch.no_grad():
        states, gates = student_states(student, tokens, torch.ones(()), GateOptions(PAIRS), torch.float32)
        torch.testing.assert_close(states, hidden_states(teacher, tokens), rtol=1e-2, atol=1e-2)
    for gated in gates:
        pairs = (gated.mix > 0).view(-1, PAIRS, 2).sum(-1)
        assert (pairs == 1).all(), "the chosen experts are one of each pair"


def test_firing_marks_the_neurons_that_say_most() -> None:
    w = torch.zeros(1)
    down = torch.tensor([[1.0, 10.0, 1.0, 1.0]])
    activity = Activity(torch.zeros(1, 1), torch.tensor([[3.0, -1.0, 0.5, 2.0]]), Matrices(w, w, w, w, w, w, down))
    assert firing(activity, 0.5).tolist() == [[1.0, 1.0, 0.0, 0.0]]
