"""The student learns, stops and goes on, grows, and comes back out of its small file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium.default_model.delta import Delta, LowRank
from consilium.errors import CheckpointError
from tests.tiny_teacher import PAIRS, tiny_blocks, tiny_splits, tiny_student, tiny_teacher
from training.checkpoints import NAME, load_run, save_run
from training.delta import make_delta, merged_student
from training.distill import Distillation, TrainingError
from training.gates import GateOptions
from training.growth import grow
from training.llama import Dense, hidden_states
from training.losses import CHUNK, Losses, distillation, gradient_of_hidden, next_tokens
from training.settings import DistillSettings
from training.student import Student, make_student, student_states

GATE = GateOptions(PAIRS, aux_weight=1e-2, z_weight=1e-4)


def _settings(steps: int, gate: GateOptions = GATE, int8_from: float = 1.0) -> DistillSettings:
    return DistillSettings(
        steps, batch=6, learning_rate=3e-3, text_weight=0.0, report_every=5, int8_from=int8_from, gate=gate
    )


def _divergence(student: Student, teacher: Dense) -> float:
    tokens = tiny_blocks()
    with torch.no_grad():
        states, _ = student_states(student, tokens, torch.ones(()), GateOptions(PAIRS), torch.float32)
        expected = hidden_states(teacher, tokens)
        found = distillation(states.flatten(0, 1), expected.flatten(0, 1), next_tokens(tokens), teacher.embed, 1.0)
    return float(found.divergence) / tokens.numel()


@pytest.mark.parametrize(
    "options",
    [
        GATE,
        GateOptions(PAIRS, noise=0.01),
        GateOptions(PAIRS, bias_rate=1e-3),
        GateOptions(PAIRS, capacity=1.5),
    ],
)
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, options: GateOptions) -> None:
    teacher = tiny_teacher(tmp_path)
    student = tiny_student(teacher)
    before = _divergence(student, teacher)
    reports = list(Distillation(student, teacher, tiny_blocks(), _settings(40, options)).run())
    assert [report.step for report in reports] == list(range(5, 41, 5))
    for layer in student.layers:
        assert layer.router is not None
        assert bool(layer.router.bias.any()) is bool(options.bias_rate)
        layer.router.bias.zero_()
    assert _divergence(student, teacher) < 0.8 * before


def test_learning_with_int8_experts_changes_what_is_learned(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    students = [tiny_student(teacher), tiny_student(teacher)]
    for student, int8_from in zip(students, (1.0, 0.0), strict=True):
        list(Distillation(student, teacher, tiny_blocks(), _settings(5, int8_from=int8_from)).run())
    float_one, int8_one = (student.parameters() for student in students)
    assert any(not torch.equal(float_one[name], int8_one[name]) for name in float_one)
    assert all(tensor.isfinite().all() for tensor in int8_one.values())


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    teacher, blocks = tiny_teacher(tmp_path), tiny_blocks()
    options = GateOptions(PAIRS, aux_weight=1e-2, noise=0.01, bias_rate=1e-3)
    whole = Distillation(tiny_student(teacher), teacher, blocks, _settings(15, options))
    list(whole.run())
    first = Distillation(tiny_student(teacher), teacher, blocks, _settings(15, options))
    next(first.run())  # to step 5
    save_run(first, tmp_path, "recipe")
    second = Distillation(tiny_student(teacher), teacher, blocks, _settings(15, options))
    assert load_run(second, tmp_path, "recipe")
    assert second.step == 5
    list(second.run())
    expected = whole.student.parameters()
    for name, tensor in second.student.parameters().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    run = Distillation(tiny_student(teacher), teacher, tiny_blocks(), _settings(5))
    assert not load_run(run, tmp_path, "recipe")
    save_run(run, tmp_path, "recipe")
    with pytest.raises(CheckpointError, match="belongs to another recipe"):
        load_run(run, tmp_path, "another")
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_run(run, tmp_path, "recipe")


def test_a_full_disk_leaves_the_last_checkpoint_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Distillation(tiny_student(tiny_teacher(tmp_path)), tiny_teacher(tmp_path), tiny_blocks(), _settings(5))
    save_run(run, tmp_path, "recipe")
    before = (tmp_path / NAME).read_bytes()

    def fail(_tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half" + str(metadata).encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoints.save_file", fail)
    with pytest.raises(TrainingError, match=r"No space left.*make room"):
        save_run(run, tmp_path, "recipe")
    assert (tmp_path / NAME).read_bytes() == before
    assert not list(tmp_path.glob(".run*"))


def test_a_gate_that_collapses_stops_the_run(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    student = tiny_student(teacher, paired=False)
    router = student.layers[1].router
    assert router is not None
    router.bias.copy_(torch.tensor([100.0, 100.0, 0.0, 0.0]))
    with pytest.raises(TrainingError, match=r"step 5: the gate of layer 1 collapsed.*aux_weight"):
        list(Distillation(student, teacher, tiny_blocks(), _settings(10)).run())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    settings = DistillSettings(10, batch=6, learning_rate=1e30, report_every=5, gate=GATE)
    with pytest.raises(TrainingError, match="not finite"):
        list(Distillation(tiny_student(teacher), teacher, tiny_blocks(), settings).run())


def test_gradients_by_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.losses.CHUNK", 3)
    assert CHUNK > 3
    student, teacher, head = torch.randn(8, 5), torch.randn(8, 5), torch.randn(9, 5)
    targets = torch.tensor([1, 2, 3, -100, 4, 5, 6, -100])
    whole = student.clone().requires_grad_()
    losses = distillation(whole, teacher, targets, head, 2.0)
    (losses.divergence + 0.5 * losses.cross_entropy).backward()

    def compute(mine: Tensor, theirs: Tensor, following: Tensor) -> Losses:
        return distillation(mine, theirs, following, head, 2.0)

    gradient, found = gradient_of_hidden(
        student, teacher, targets, lambda each: each.divergence + 0.5 * each.cross_entropy, compute
    )
    torch.testing.assert_close(gradient, whole.grad)
    torch.testing.assert_close(found.divergence, losses.divergence.detach())


def test_growing_copies_the_busiest_expert_and_shares_its_tokens(tmp_path: Path) -> None:
    teacher, tokens = tiny_teacher(tmp_path), tiny_blocks()
    student = make_student(teacher, (2,) * 7, tiny_splits(teacher), paired=False)
    options = GateOptions(1)
    with torch.no_grad():
        _, gates = student_states(student, tokens, torch.ones(()), options, torch.float32)
    load = torch.stack([gated.load for gated in gates])  # [layers, E]
    grown = grow(student, load.argmax(1).tolist(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, after = student_states(grown, tokens, torch.ones(()), options, torch.float32)
    busiest = int(load[0].argmax())
    assert after[0].load.shape == (5,)
    both = after[0].load[[busiest, 4]]
    assert both.sum() >= load[0, busiest], "one of the two is liked at least as well as the expert was"
    assert both.min() > 0, "and neither takes all"
    router = grown.layers[0].router
    assert router is not None
    assert router.spread.sum(1).tolist() == [4] * 5
    assert torch.equal(router.spread.sum(0), torch.ones(20))
    mine, copy = (router.spread[each].nonzero()[:, 0] for each in (busiest, 4))
    assert torch.equal(grown.layers[0].base.down[:, mine], grown.layers[0].base.down[:, copy])
    reports = list(Distillation(grown, teacher, tokens, _settings(5, GateOptions(1))).run())
    assert reports[-1].step == 5


def test_the_small_file_makes_nearly_the_same_student(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path)
    student, splits = tiny_student(teacher), tiny_splits(teacher)
    list(Distillation(student, teacher, tiny_blocks(), _settings(40)).run())
    make_delta(student, splits, PAIRS).save(tmp_path / "delta.npz")
    again = merged_student(Delta.load(tmp_path / "delta.npz"), teacher)
    for layer, merged in zip(student.layers, again.layers, strict=True):
        for name, matrix, expected, base in zip(
            merged.base._fields, merged.base, layer.merged(torch.float32), layer.base, strict=True
        ):
            changed = (expected - base).norm()
            assert (matrix - expected).norm() < 0.03 * changed, name
    assert _divergence(again, teacher) == pytest.approx(_divergence(student, teacher), rel=0.05)


def test_a_change_is_added_exactly_and_rounded_once() -> None:
    random = np.random.default_rng(0)
    rank, out, size = 5, 4, 6
    a, b = random.integers(-127, 128, (1, rank, size), np.int8), random.integers(-127, 128, (1, out, rank), np.int8)
    change = LowRank(a, b, np.array([[-20, -35, 3 - 20, -9, -14]], np.int8))
    matrix = random.standard_normal((out, size)).astype(np.float32)
    found = change.apply(0, matrix)
    for row, column in np.ndindex(out, size):
        terms = (
            Fraction(int(b[0, row, j])) * int(a[0, j, column]) * Fraction(2) ** int(change.exponents[0, j])
            for j in range(rank)
        )
        exact = Fraction(float(matrix[row, column])) + sum(terms)
        assert (
            abs(Fraction(float(found[row, column])) - exact) <= abs(Fraction(float(np.spacing(found[row, column])))) / 2
        )
    with pytest.raises(CheckpointError, match="belongs to another model"):
        change.apply(0, matrix[:2])
