"""A run from its last checkpoint to its end: progress, growth, checkpoints, a log and the curves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from training.checkpoints import load_growth, load_run, save_run
from training.curves import draw_curves
from training.distill import Distillation, Report
from training.growth import grow
from training.recipe import Recipe


def learn(run: Distillation, recipe: Recipe, out: Path, console: Console) -> Distillation:
    """All steps that are left; the run at its end, whose student may have grown and whose gates have no bias.

    Raises CheckpointError for a checkpoint of another recipe, and TrainingError.
    """
    journal = _Journal(run, recipe, out)
    if journal.run.step:
        console.print(f"going on after step {journal.run.step}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        journal.finish(bar, bar.add_task("training", total=recipe.distill.steps, completed=journal.run.step))
    for layer in journal.run.student.layers:
        if layer.router is not None:
            layer.router.bias.zero_()  # a served gate has none
    return journal.run


class _Journal:
    """What is on disk of a run, and the run itself."""

    def __init__(self, run: Distillation, recipe: Recipe, out: Path) -> None:
        self.run, self._recipe, self._out, self._digest = run, recipe, out, recipe.digest()
        self._log, self._reports = out / "log.jsonl", list[Report]()
        self._grown: list[list[int]] = []
        for busiest in load_growth(out, self._digest):
            self._grow(busiest)
        if load_run(self.run, out, self._digest) and self._log.is_file():
            reports = [Report(**json.loads(line)) for line in self._log.read_text("utf-8").splitlines()]
            self._reports = [report for report in reports if report.step <= self.run.step]
        self._saved = self.run.step

    def finish(self, bar: Progress, task: TaskID) -> None:
        """The remaining steps, and between them the growth."""
        growth, steps = self._recipe.growth, self._recipe.distill.steps
        while len(self._grown) < growth.experts:
            self._advance((len(self._grown) + 1) * growth.every, bar, task)
            assert self.run.load is not None  # a student that grows has gates
            self._grow(self.run.load.argmax(1).tolist())
            self._save()
        self._advance(steps, bar, task)

    def _advance(self, until: int, bar: Progress, task: TaskID) -> None:
        for report in self.run.run(until):
            self._reports.append(report)
            text = f"divergence {report.divergence:.3f}, load {report.smallest_load:.2f} to {report.largest_load:.2f}"
            bar.update(task, completed=report.step, description=text)
            if report.step - self._saved >= self._recipe.distill.checkpoint_every or report.step == until:
                self._save()

    def _grow(self, busiest: list[int]) -> None:
        seed = 7919 * self._recipe.distill.seed + len(self._grown)
        student = grow(self.run.student, busiest, torch.Generator().manual_seed(seed))
        self.run = self.run.grown(student)
        self._grown.append(busiest)

    def _save(self) -> None:
        save_run(self.run, self._out, self._digest, self._grown)
        self._saved = self.run.step
        self._log.write_text("".join(json.dumps(asdict(each)) + "\n" for each in self._reports), "utf-8")
        (self._out / "curves.svg").write_text(draw_curves(self._reports), "utf-8")
