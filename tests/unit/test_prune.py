"""Fewer experts: which stay, how two become one, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError, ConfigError
from consilium.prune.choose import choose_kept, match, merge, nearest_kept
from consilium.prune.write import Pruning, prune
from gateway.evaluation import REFERENCE, Evaluated
from gateway.prune import main
from tests.tiny_models import (
    save_deepseek,
    save_deepseek_v2,
    save_deepseek_v3,
    save_ernie4_5_moe,
    save_glm4_moe,
    save_gpt_oss,
    save_granitemoe,
    save_minimax_m2,
    save_mixtral,
    save_olmoe,
    save_phimoe,
    save_qwen2_moe,
    save_qwen3_moe,
)

TOKENS = [5, 9, 200, 31, 7, 77, 140, 12]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_the_least_used_go_and_ties_stay_in_order() -> None:
    assert choose_kept([5, 1, 9, 1], 1, 2) == [0, 1, 2]
    assert choose_kept([5, 1, 9, 1], 2, 2) == [0, 2]
    with pytest.raises(ConfigError, match=r"4 experts and every token needs 2; drop 1 to 2"):
        choose_kept([5, 1, 9, 1], 3, 2)


def test_likeness_is_that_of_the_gate() -> None:
    router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    assert nearest_kept(router, 2, [0, 1]) == 0


def test_match_finds_a_shuffled_copy() -> None:
    neurons, order = _normal(20, 8), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    likeness = torch.nn.functional.normalize(neurons) @ torch.nn.functional.normalize(neurons[order]).T
    assert torch.equal(order[match(likeness)], torch.arange(20))


def test_merging_an_expert_with_a_shuffled_copy_changes_nothing() -> None:
    gate, up, down = _normal(12, 6), _normal(12, 6), _normal(6, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    merged = merge((gate, up, down), (gate[order], up[order], down[:, order]), 0.3)
    for found, expected in zip(merged, (gate, up, down), strict=True):
        torch.testing.assert_close(found, expected)


PRUNED: tuple[Callable[..., Path], ...] = (
    save_mixtral,
    save_qwen3_moe,
    save_olmoe,
    save_qwen2_moe,
    save_deepseek,
    save_deepseek_v2,
    partial(save_deepseek_v3, n_group=1, topk_group=1),
    save_gpt_oss,
    save_granitemoe,
    save_phimoe,
    save_ernie4_5_moe,
    save_glm4_moe,
    save_minimax_m2,
)


@pytest.mark.parametrize("save", PRUNED)
def test_experts_that_stay_are_the_same_under_new_numbers(save: Callable[[Path], Path], tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    checkpoint = Checkpoint(model)
    load = {layer: [9] * checkpoint.config.num_experts for layer in checkpoint.config.expert_layers()}
    kept_count = checkpoint.config.num_experts - 1
    for rows in load.values():
        rows[1] = 0
    prune(checkpoint, tmp_path / "out", Pruning(load, 1))
    pruned = Checkpoint(tmp_path / "out")
    assert pruned.config.num_experts == kept_count
    for place, expert in enumerate(each for each in range(kept_count + 1) if each != 1):
        for mine, theirs in zip(pruned.expert(2, place).matrices, checkpoint.expert(2, expert).matrices, strict=True):
            assert isinstance(mine, Tensor)
            assert isinstance(theirs, Tensor)
            assert torch.equal(mine, theirs)
    with torch.inference_mode():
        logits = Evaluated(pruned, REFERENCE, "float32").logits(TOKENS)
    assert logits.isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_cannot_be_pruned_is_refused_with_the_reason(tmp_path: Path) -> None:
    grouped = Checkpoint(save_deepseek_v3(tmp_path / "deepseek_v3"))
    with pytest.raises(CheckpointError, match="from this deepseek_v3 model: its gate chooses among 4 groups of"):
        prune(grouped, tmp_path / "out", Pruning({}, 1))
    biased = Checkpoint(save_gpt_oss(tmp_path / "gpt_oss"))
    with pytest.raises(CheckpointError, match="--merge does not know the biases of gpt_oss experts; leave it out"):
        prune(biased, tmp_path / "out", Pruning({}, 1, merge=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [[], ["--merge"]])
def test_the_command_says_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    model = save_mixtral(tmp_path / "model")
    load = {"layers": [{"layer": layer, "rows": [60, 30, 2, 8]} for layer in range(3)]}
    (tmp_path / "load.json").write_text(json.dumps(load))
    (tmp_path / "text.txt").write_text("a text to say the cost on, " * 4)
    arguments = [str(model), str(tmp_path / "out"), "--load", str(tmp_path / "load.json"), "--drop", "1"]
    assert main([*arguments, "--text", str(tmp_path / "text.txt"), *flags]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 experts a layer" in said
    assert "98.0% of the rows" in said
    assert "perplexity" in said
    assert main(arguments) == 1
    assert "is not empty" in capsys.readouterr().err


def test_a_load_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_mixtral(tmp_path / "model")
    (tmp_path / "load.json").write_text('{"layers": [{"layer": 0, "rows": [1, 2]}]}')
    assert main([str(model), str(tmp_path / "out"), "--load", str(tmp_path / "load.json"), "--drop", "1"]) == 1
    assert "2 experts in layer 0, the model 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
