"""Perplexity, agreement and divergence of modes, over tiny models in this process."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError, ConfigError
from consilium.experts import compute_expert
from consilium.gate import Routing
from consilium.quantization import quantize_rows
from consilium.quantize.run import quantize
from consilium.quantize.text import calibration_text
from gateway.batches import group_by_expert
from gateway.evaluate import main
from gateway.evaluation import MODES, Score, evaluate, find_modes, split_windows
from gateway.local_experts import LocalExperts, run_now
from tests.local_workers import rows_of
from tests.tiny_models import save_mixtral, save_qwen3_moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(calibration_text(None)[:600])
    return file


def test_local_experts_answer_as_workers_do(model: Path) -> None:
    checkpoint = Checkpoint(model)
    arithmetic = find_arithmetic("int8", "float32", 64, 48)
    rows, scales = quantize_rows(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)))
    ids = torch.tensor([[0, 2], [1, 2], [0, 3], [2, 3], [0, 1]])
    batches = group_by_expert(rows, scales, Routing(ids, torch.ones(5, 2)))
    outputs, failures = run_now(LocalExperts(checkpoint, arithmetic).dispatch(1, batches))
    assert not failures
    rows_out = rows_of(outputs)
    for token, experts in enumerate(ids.tolist()):
        for place, expert in enumerate(experts):
            weights = arithmetic.prepare(checkpoint.expert(1, expert))
            alone = compute_expert(arithmetic, weights, rows[token : token + 1], scales[token : token + 1])
            assert torch.equal(rows_out[2 * token + place], alone[0])


def test_a_score_is_what_its_name_says() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    mode = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log()
    score = Score("int8")
    score.add(mode + 3.0, reference, torch.tensor([0, 2]))  # logits may be off by a constant
    score.add(mode[:1], reference[:1], torch.tensor([1]))
    assert score.positions == 3
    assert score.perplexity == pytest.approx((0.25 * 0.6 * 0.5) ** (-1 / 3))
    assert score.agreement == pytest.approx(1 / 3)
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.1 * math.log(0.5) + 0.7 * math.log(7 / 6)
    assert score.divergence == pytest.approx((2 * first + second) / 3)


def test_windows() -> None:
    assert [list(each) for each in split_windows(range(7), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert [list(each) for each in split_windows(range(8), 3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def plain_perplexity(folder: Path, windows: list[list[int]]) -> float:
    """By transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses: list[Tensor] = []
    for window in windows:
        found = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
        losses.append(-found.gather(1, torch.tensor(window[1:])[:, None])[:, 0])
    return math.exp(float(torch.cat(losses).mean()))


@torch.inference_mode()
def test_every_mode_against_none(tmp_path: Path) -> None:
    folder = save_qwen3_moe(tmp_path / "model", mlp_only_layers=[1])
    checkpoint = Checkpoint(folder)
    windows = torch.randint(384, (3, 20), generator=torch.Generator().manual_seed(2)).tolist()
    scores = evaluate(checkpoint, checkpoint, MODES, windows, "float32")
    assert [score.mode for score in scores] == [mode.name for mode in MODES]
    none, *others = scores
    assert none.perplexity == pytest.approx(plain_perplexity(folder, windows), rel=1e-4)
    assert (none.agreement, none.divergence, none.positions) == (1.0, 0.0, 57)
    for score in others:
        assert score.positions == 57
        assert 1e-7 < score.divergence < 0.05
        assert (0.4 if "int4" in score.mode else 0.8) < score.agreement <= 1  # of an untrained model
        assert score.perplexity != none.perplexity
        assert score.perplexity == pytest.approx(none.perplexity, rel=0.1)


def test_the_command_prints_a_table_and_writes_json(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", str(text), "--tokens", "100", "--window", "40", "--json", str(tmp_path / "out.json")]
    assert main([str(model), *flags]) == 0
    printed = capsys.readouterr().out
    assert "97 predicted tokens" in printed
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content["modes"]) == [mode.name for mode in MODES]
    for mode, figures in content["modes"].items():
        assert mode in printed
        assert f"{figures['perplexity']:.3f}" in printed
        assert f"{figures['agreement']:.2%}" in printed


def test_an_int8_model_is_compared_with_what_it_was_made_from(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(model, tmp_path / "int8")
    flags = ["--text", str(text), "--tokens", "60", "--modes", "int8-experts", "--json", str(tmp_path / "out.json")]
    assert main([str(tmp_path / "int8"), *flags]) == 1
    assert "is int8 on disk; name the float model it was made from with --reference" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_said(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"--modes: there is no mode 'int3'; choose from none, int8, int8-experts"):
        find_modes(["none", "int3"])
    other = save_mixtral(tmp_path / "other", vocab_size=400)
    with pytest.raises(CheckpointError, match=r"a vocabulary of 384 tokens, the reference .* one of 400"):
        evaluate(Checkpoint(model), Checkpoint(other), MODES, [[1, 2]], "float32")
    assert main([str(model), "--text", str(tmp_path / "absent")]) == 1
    assert f"error: --text: cannot read {tmp_path / 'absent'}" in capsys.readouterr().err
    text.write_text("")
    assert main([str(model), "--text", str(text)]) == 1
    assert "error: the text has 0 tokens, and at least 2 are needed" in capsys.readouterr().err
