"""`consilium train`: from a recipe to a model, its curves and its figures."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from consilium.errors import ConfigError
from training.blocks import Tokens
from training.checkpoints import load_rows, load_splits, save_rows, save_splits
from training.coactivation import firing, walk_layers
from training.delta import make_delta, merged_student
from training.distill import Distillation, Kernels
from training.export import write_model
from training.journal import learn
from training.llama import Dense
from training.measure import Figures, States, as_table, dense_states, measure, served_states
from training.recipe import Recipe
from training.split import Split, balanced_clusters, random_split, split_layer
from training.student import Student, make_student
from training.teacher import load_teacher, moved
from training.texts import Corpora, generate, read_corpora, tokenizer_of


def train(recipe: Recipe, out: Path, console: Console | None = None) -> None:
    """Train and write the model to ``out``; an interrupted run is taken up where its last checkpoint was.

    Raises ConfigError, CheckpointError and TrainingError that say what to do.
    """
    console = console or Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = moved(load_teacher(recipe.teacher), device, torch.float32)
    working = moved(teacher, device, torch.bfloat16) if device.type == "cuda" else teacher
    corpora = read_corpora(recipe, device, _generated(recipe, working, out, console))
    splits = None if recipe.dense else found_splits(recipe, teacher, corpora.train, out)
    student = make_student(teacher, recipe.rank_list(), splits, paired=recipe.gate.paired, seed=recipe.distill.seed)
    kernels = Kernels.compiled() if device.type == "cuda" else Kernels()
    run = Distillation(student, working, corpora.train, recipe.settings(), kernels)
    student = learn(run, recipe, out, console).student
    if recipe.delta and splits is not None:
        delta = make_delta(student, splits, recipe.split.pairs)
        delta.save(out / "delta.npz")
        student = merged_student(delta, teacher)
    _write_figures(student, teacher, recipe, corpora, out)
    if recipe.dense:
        console.print(f"figures of the dense control are in {out / 'figures.json'}", soft_wrap=True)
        return
    write_model(student, recipe.split.pairs, recipe.teacher, out)
    console.print(f"the model is in {out}; its int8 copy: consilium quantize {out} OUT", soft_wrap=True)


def _generated(recipe: Recipe, teacher: Dense, out: Path, console: Console) -> Tokens | None:
    """The teacher's own text; kept in ``out`` for a run that goes on."""
    if recipe.generated is None:
        return None
    digest = recipe.digest()
    rows = load_rows(out, digest)
    if rows is None:
        console.print("the teacher writes", soft_wrap=True)
        rows = generate(recipe.generated, teacher, tokenizer_of(recipe.teacher))
        save_rows(rows, out, digest)
    return rows


def found_splits(recipe: Recipe, teacher: Dense, blocks: Tensor, out: Path) -> list[Split]:
    """Which neurons are whose, and the first gates; kept in ``out`` for a run that goes on."""
    digest, seed = recipe.digest(), recipe.distill.seed
    splits = load_splits(out, digest, blocks.device)
    if splits is None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(blocks), generator=generator)[: recipe.split.sample_blocks]
        splits = split_layers(recipe, teacher, blocks[chosen.to(blocks.device)].long(), generator)
        save_splits(splits, out, digest)
    return splits


def split_layers(recipe: Recipe, teacher: Dense, sample: Tensor, generator: torch.Generator) -> list[Split]:
    """The experts of every layer, found on sample blocks [B, L]."""
    how, slice_size = recipe.split, teacher.shape.dense_size // recipe.split.pairs
    if not slice_size // 2 <= how.neurons <= slice_size:
        raise ConfigError(
            f"split.neurons: {how.pairs} slices of {teacher.shape.dense_size} neurons have {slice_size} each; "
            f"choose {slice_size // 2} to {slice_size}, found {how.neurons}"
        )
    if how.shared > how.neurons:
        raise ConfigError(f"split.shared: an expert has {how.neurons} neurons; share that many at most")
    splits = []
    for activity in walk_layers(teacher, sample):
        if how.random:
            found = random_split(activity, how.pairs, how.neurons, generator)
        else:
            points = firing(activity, how.firing_share)[::4].T.contiguous()
            slices = balanced_clusters(points, how.pairs, generator)
            found = split_layer(activity, slices, how.pairs, how.neurons, how.shared)
        splits.append(Split(found.neurons.clone(), found.router.clone()))  # made in inference mode
    return splits


def held_out_figures(model: States, teacher: Dense, corpora: Corpora) -> dict[str, Figures]:
    """By corpus, against the original teacher, in float32."""
    expected = dense_states(teacher)
    return {
        name: measure(model, expected, blocks.long(), teacher.embed, 8)[0] for name, blocks in corpora.held_out.items()
    }


def _write_figures(student: Student, teacher: Dense, recipe: Recipe, corpora: Corpora, out: Path) -> None:
    figures = {
        "teacher": held_out_figures(dense_states(teacher), teacher, corpora),
        "student": held_out_figures(served_states(student, recipe.split.pairs), teacher, corpora),
    }
    table = {name: as_table(each) for name, each in figures.items()}
    (out / "figures.json").write_text(json.dumps(table, indent=2) + "\n", "utf-8")
