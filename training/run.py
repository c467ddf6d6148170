"""`consilium train`: from a recipe to a model, its curves and its figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor

from consilium.default_model.gguf_file import GgufFile
from consilium.default_model.tokenizer import read_tokenizer
from consilium.errors import ConfigError
from training.blocks import cut_blocks, is_held_out, join_documents
from training.checkpoints import load_run, load_splits, save_run, save_splits
from training.coactivation import firing, walk_layers
from training.curves import draw_curves
from training.distill import Distillation, Kernels, Report
from training.export import write_model
from training.gates import GateOptions
from training.llama import Dense, hidden_states
from training.measure import Figures, States, as_table, measure
from training.recipe import Recipe
from training.split import Split, balanced_clusters, random_split, split_layer
from training.student import Student, make_student, student_states
from training.teacher import load_teacher, moved


@dataclass(frozen=True, slots=True)
class Corpora:
    """Blocks [N, L] to learn from, and those of each corpus that are only measured."""

    train: Tensor
    held_out: dict[str, Tensor]


def train(recipe: Recipe, out: Path, console: Console | None = None) -> None:
    """Train and write the model to ``out``; an interrupted run is taken up where its last checkpoint was.

    Raises ConfigError, CheckpointError and TrainingError that say what to do.
    """
    console = console or Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = moved(load_teacher(recipe.teacher), device, torch.float32)
    corpora = read_corpora(recipe, device)
    student = new_student(recipe, teacher, corpora.train, out)
    working = moved(teacher, device, torch.bfloat16) if device.type == "cuda" else teacher
    kernels = Kernels.compiled() if device.type == "cuda" else Kernels()
    run = Distillation(student, working, corpora.train, recipe.settings(), kernels)
    _learn(run, recipe, out, console)
    for layer in student.layers:
        if layer.router is not None:
            layer.router.bias.zero_()  # a served gate has none
    figures = {
        "teacher": held_out_figures(_dense_states(teacher), teacher, corpora),
        "student": held_out_figures(partial(_student_states, student, recipe), teacher, corpora),
    }
    (out / "figures.json").write_text(
        json.dumps({k: as_table(v) for k, v in figures.items()}, indent=2) + "\n", "utf-8"
    )
    if recipe.dense:
        console.print(f"figures of the dense control are in {out / 'figures.json'}", soft_wrap=True)
        return
    write_model(student, recipe.split.pairs, recipe.teacher, out)
    console.print(f"the model is in {out}; its int8 copy: consilium quantize {out} OUT", soft_wrap=True)


def read_corpora(recipe: Recipe, device: torch.device) -> Corpora:
    """Every text cut to blocks. Raises ConfigError for a file that is missing or a corpus that is too small."""
    tokenizer = _tokenizer(recipe.teacher)
    separator = tokenizer.token_to_id(recipe.separator)
    if separator is None:
        raise ConfigError(f"separator: the teacher's tokenizer has no token {recipe.separator!r}")
    train, held_out = [], {}
    for name, file in recipe.text.items():
        try:
            documents = [part for part in file.read_text("utf-8").split("\n\n") if part.strip()]
        except OSError as error:
            raise ConfigError(f"text.{name}: cannot read {file}: {error.strerror}") from None
        for kept in (False, True):
            chosen = [each for each in documents if is_held_out(each, recipe.held_out) is kept]
            encoded = (tokenizer.encode(each, add_special_tokens=False).ids for each in chosen)
            place = f"text.{name}, {'held out' if kept else 'to learn from'}:"
            blocks = cut_blocks(join_documents(encoded, separator), recipe.block_length, place)
            tensor = torch.from_numpy(blocks.astype(np.int32)).to(device)
            if kept:
                held_out[name] = tensor
            else:
                train.append(tensor)
    return Corpora(torch.cat(train), held_out)


def new_student(recipe: Recipe, teacher: Dense, blocks: Tensor, out: Path) -> Student:
    """A student that has learned nothing yet. Which neurons are whose is kept in ``out`` for a run that goes on."""
    ranks, seed = recipe.rank_list(), recipe.distill.seed
    if recipe.dense:
        return make_student(teacher, ranks, None, seed=seed)
    digest = recipe.digest()
    splits = load_splits(out, digest, blocks.device)
    if splits is None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(blocks), generator=generator)[: recipe.split.sample_blocks]
        splits = split_layers(recipe, teacher, blocks[chosen.to(blocks.device)].long(), generator)
        save_splits(splits, out, digest)
    return make_student(teacher, ranks, splits, paired=recipe.gate.paired, seed=seed)


def split_layers(recipe: Recipe, teacher: Dense, sample: Tensor, generator: torch.Generator) -> list[Split]:
    """The experts of every layer, found on sample blocks [B, L]."""
    how, slice_size = recipe.split, teacher.shape.dense_size // recipe.split.pairs
    if not slice_size // 2 <= how.neurons <= slice_size:
        raise ConfigError(
            f"split.neurons: {how.pairs} slices of {teacher.shape.dense_size} neurons have {slice_size} each; "
            f"choose {slice_size // 2} to {slice_size}, found {how.neurons}"
        )
    splits = []
    for activity in walk_layers(teacher, sample):
        if how.random:
            found = random_split(activity, how.pairs, how.neurons, generator)
        else:
            points = firing(activity, how.firing_share)[::4].T.contiguous()
            found = split_layer(activity, balanced_clusters(points, how.pairs, generator), how.pairs, how.neurons)
        splits.append(Split(found.neurons.clone(), found.router.clone()))  # made in inference mode
    return splits


def held_out_figures(model: States, teacher: Dense, corpora: Corpora) -> dict[str, Figures]:
    """By corpus, against the original teacher, in float32."""
    expected = _dense_states(teacher)
    return {
        name: measure(model, expected, blocks.long(), teacher.embed, 8)[0] for name, blocks in corpora.held_out.items()
    }


def _learn(run: Distillation, recipe: Recipe, out: Path, console: Console) -> None:
    """All steps that are left, with a checkpoint now and then and the curves beside it."""
    digest = recipe.digest()
    log, reports = out / "log.jsonl", list[Report]()
    if load_run(run, out, digest):
        console.print(f"going on after step {run.step}")
        reports = [Report(**json.loads(line)) for line in log.read_text("utf-8").splitlines()]
        reports = [report for report in reports if report.step <= run.step]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=recipe.distill.steps, completed=run.step)
        saved = run.step
        for report in run.run():
            reports.append(report)
            text = f"divergence {report.divergence:.3f}, load {report.smallest_load:.2f} to {report.largest_load:.2f}"
            bar.update(task, completed=report.step, description=text)
            if report.step - saved >= recipe.distill.checkpoint_every or report.step == recipe.distill.steps:
                save_run(run, out, digest)
                saved = report.step
                log.write_text("".join(json.dumps(asdict(each)) + "\n" for each in reports), "utf-8")
                (out / "curves.svg").write_text(draw_curves(reports), "utf-8")


def _tokenizer(teacher: Path) -> Tokenizer:
    if teacher.is_dir():
        return Tokenizer.from_file(str(teacher / "tokenizer.json"))
    return read_tokenizer(GgufFile(teacher))


def _dense_states(teacher: Dense) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    return lambda tokens: (hidden_states(teacher, tokens), None)


def _student_states(student: Student, recipe: Recipe, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    hard = torch.ones((), device=tokens.device)
    options = GateOptions(recipe.split.pairs)  # nothing of what helped it learn
    states, gates = student_states(student, tokens, hard, options, torch.float32)
    return states, torch.stack([gated.load for gated in gates]) if gates else None
