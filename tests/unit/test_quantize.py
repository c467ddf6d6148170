"""`consilium quantize`: what it writes, what an interruption leaves, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint, ExpertTensors
from consilium.cli import main
from consilium.config import Quantization
from consilium.content_hash import content_hash
from consilium.errors import CheckpointError, ConfigError
from consilium.int4 import Int4Rows
from consilium.model_folder import read_model_folder
from consilium.models import resolve_model
from consilium.quantization import Quantized
from consilium.quantize import layer_tensors, unfinished
from consilium.quantize.layer_tensors import Shard
from consilium.quantize.run import quantize
from consilium.quantize.text import FEWEST_TOKENS, MOST_TOKENS, calibration_text, encode_text
from gateway.evaluation import Evaluated, evaluate, find_modes
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
INTEGERS: tuple[Quantization, ...] = ("int8", "int4")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_mixtral(tmp_path / "model")


def contents(folder: Path) -> dict[str, object]:
    """Everything in ``folder``; of shards what they hold, since the order of their metadata is left to chance."""
    found: dict[str, object] = {}
    for file in sorted(folder.iterdir()):
        found[file.name] = file.read_bytes()
        if file.suffix == ".safetensors":
            tensors = {name: (tensor.dtype, tensor.tolist()) for name, tensor in load_file(file).items()}
            with safe_open(file, framework="pt") as shard:
                found[file.name] = (shard.metadata(), tensors)
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_every_matrix_but_the_routers_is_int8(tmp_path: Path, fused: bool) -> None:
    model = save_qwen3_moe(
        tmp_path / "model", mlp_only_layers=[1], attention_bias=True, tie_word_embeddings=True, num_hidden_layers=3
    )
    if fused:
        fuse_experts(model)
    (model / "LICENSE").write_text("licence")
    quantize(model, tmp_path / "int8")
    before, after = Checkpoint(model), Checkpoint(tmp_path / "int8")
    assert after.int8
    assert not after.config.tie_embeddings
    float_names = [name for name in file_names(tmp_path / "int8") if isinstance(read(after, name), torch.Tensor)]
    kinds = ("norm.weight", "mlp.gate.weight", "proj.bias", "embed_tokens.weight", "weight_scale")
    assert all(name.endswith(kinds) for name in float_names)
    for layer in (0, 2):
        for expert in range(6):
            assert all(isinstance(matrix, Quantized) for matrix in after.expert(layer, expert).matrices)
            assert after.stored_hash(layer, expert) == content_hash(after.expert(layer, expert).matrices)
    assert all(isinstance(matrix, Quantized) for matrix in after.dense(1).matrices)
    assert isinstance(after.matrix("lm_head.weight", (384, 64)), Quantized)
    assert torch.equal(
        after.tensor("model.embed_tokens.weight", (384, 64)), before.tensor("model.embed_tokens.weight", (384, 64))
    )
    assert (tmp_path / "int8" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "int8" / "LICENSE").read_text() == "licence"
    assert not list((tmp_path / "int8").glob("quantize.*"))


def fuse_experts(folder: Path) -> None:
    from tests.unit.test_checkpoint import QWEN, fuse, rewrite

    tensors = load_file(folder / "model.safetensors")
    dense = {name: tensors.pop(name) for name in list(tensors) if ".layers.1.mlp." in name}
    renamed = {
        name.replace("layers.2.", "layers.1."): tensor for name, tensor in tensors.items() if ".experts." in name
    }
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    fuse(renamed, "mlp", "experts.gate_up_proj", "experts.down_proj", QWEN[1])
    moved = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in renamed.items()}
    rewrite(folder, {**kept, **dense, **moved})


def file_names(folder: Path) -> list[str]:
    return list(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor | Quantized:
    shape = checkpoint.shape(name)
    return checkpoint.matrix(name, (shape[0], shape[1])) if len(shape) == 2 else checkpoint.tensor(name, shape)


def test_weights_stand_for_what_they_stood_for(model: Path, tmp_path: Path) -> None:
    """Smoothing moves factors between matrices; the products of two that meet are what they were."""
    name = "model.layers.1.post_attention_layernorm.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][5] *= 256  # an outlier
    save_file(tensors, model / "model.safetensors")
    quantize(model, tmp_path / "int8")
    before, after = Checkpoint(model), Checkpoint(tmp_path / "int8")
    norm, smoothed = (each.tensor(name, (64,)) for each in (before, after))
    assert 8 <= norm[5] / smoothed[5] <= 256
    gate, quantized = before.expert(1, 2).floats()[0], after.expert(1, 2).gate
    assert isinstance(quantized, Quantized)
    expected = gate * norm
    found = quantized.values.float() * quantized.scales[:, None] * smoothed
    assert (found - expected).norm() / expected.norm() < 0.02


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let ``count`` shards be written, and die in the middle of the next one."""
    whole, written = unfinished._write_tensors, []

    def write(file: Path, *rest: object) -> None:
        if file.name.startswith("model-"):
            written.append(file)
            if len(written) > count:
                file.with_name(f".{file.name}.partial").write_bytes(b"half")
                raise Interrupted
        whole(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(unfinished, "_write_tensors", write)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_an_interrupted_run_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    quantize(model, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(Interrupted):
            quantize(model, tmp_path / "int8")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "int8").glob("model-*")}
    assert len(before) == count
    for reader in (read_model_folder, resolve_model_path, Checkpoint):
        with pytest.raises(CheckpointError, match=r"int8 is half written: .* `consilium quantize MODEL .*int8`"):
            reader(tmp_path / "int8")
    quantize(model, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(tmp_path / "straight")
    after = {path.name: path.stat().st_ino for path in (tmp_path / "int8").glob("model-*")}
    assert {name: after[name] for name in before} == before, "finished shards are not written again"


def resolve_model_path(folder: Path) -> object:
    return resolve_model(str(folder))


def test_a_damaged_shard_is_noticed_and_made_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Interrupted):
            quantize(model, tmp_path / "int8")
    damaged = tmp_path / "int8" / "model-00002-of-00005.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    quantize(model, tmp_path / "int8")
    assert contents(tmp_path / "int8") == contents(tmp_path / "straight")


def test_an_unfinished_run_of_something_else_is_not_taken_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            quantize(model, tmp_path / "int8")
    text = tmp_path / "text"
    text.write_text(calibration_text(None)[::-1])
    with pytest.raises(ConfigError, match=r"unfinished run .* another model, text or version; .*--force"):
        quantize(model, tmp_path / "int8", text)
    quantize(model, tmp_path / "int8", text, force=True)
    assert Checkpoint(tmp_path / "int8").int8


def test_what_is_in_the_way_is_not_lost(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for force in (False, True):
        with pytest.raises(ConfigError, match="out exists and is no model folder"):
            quantize(model, out, force=force)
        with pytest.raises(ConfigError, match="is the model itself"):
            quantize(model, model, force=force)
    assert (out / "precious").read_text() == "x"
    quantize(model, tmp_path / "int8")
    with pytest.raises(ConfigError, match=r"holds a model already; .*--force"):
        quantize(model, tmp_path / "int8")
    quantize(model, tmp_path / "int8", force=True)
    with pytest.raises(CheckpointError, match="int8 already"):
        quantize(tmp_path / "int8", tmp_path / "again")


def test_a_text_that_is_too_short_is_refused_with_the_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the experts meet")
    assert main(["quantize", str(model), str(tmp_path / "int8"), "--text", str(text)]) == 1
    count = len(encode_text(model, 384, "the experts meet", 1, 99))
    assert f"error: the text has {count} tokens, and at least 1024 are needed" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists()
    text.write_bytes(b"caf\xe9" * 999)
    assert main(["quantize", str(model), str(tmp_path / "int8"), "--text", str(text)]) == 1
    assert f"{text} is not UTF-8 text (byte 3)" in capsys.readouterr().err
    assert main(["quantize", str(model), str(tmp_path / "int8"), "--text", str(tmp_path / "no")]) == 1
    assert f"cannot read {tmp_path / 'no'}" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has token ids up to \d+, .* vocab_size is 300"):
        quantize(model, tmp_path / "int8")
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        quantize(model, tmp_path / "int8")


def test_bad_weights_are_named_and_leave_a_run_that_can_go_on(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    bad = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    sound = tensors[bad].clone()
    tensors[bad][1, 2] = torch.nan
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.3\.w2\.weight: .* found nan at \[1, 2\]"):
        quantize(model, tmp_path / "int8")
    tensors[bad] = sound
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ConfigError, match="--force"):  # other weights by now
        quantize(model, tmp_path / "int8")


def test_the_built_in_text_is_long_enough_for_any_tokenizer(model: Path) -> None:
    text = calibration_text(None)
    assert len(text.split()) > 1024
    assert len(encode_text(model, 384, text, FEWEST_TOKENS, MOST_TOKENS)) == MOST_TOKENS


def test_experts_on_disk_have_their_hashes_beside_them(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "int8")
    with safe_open(tmp_path / "int8" / "model-00003-of-00005.safetensors", framework="pt") as file:
        assert {name for name in file.metadata() if name != "format"} == {f"consilium.expert.1.{e}" for e in range(4)}
    assert Checkpoint(model).stored_hash(1, 0) is None


def test_a_long_matrix_is_rounded_as_if_it_were_short(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = Shard({}).add_matrix("w.weight", matrix)
    monkeypatch.setattr(layer_tensors, "BLOCK_ROWS", 32)
    blocks = Shard({}).add_matrix("w.weight", matrix)
    assert torch.equal(whole.values, blocks.values)
    assert torch.equal(whole.scales, blocks.scales)


OTHERS: tuple[Callable[..., Path], ...] = (
    save_olmoe,
    save_qwen2_moe,
    save_deepseek,
    save_deepseek_v2,
    save_deepseek_v3,
    save_phimoe,
    save_ernie4_5_moe,
    save_glm4_moe,
    save_minimax_m2,
)


@pytest.mark.parametrize("save", OTHERS)
def test_other_families_are_rounded_without_smoothing(save: Callable[[Path], Path], tmp_path: Path) -> None:
    """What is written computes what the float checkpoint does, to the last bit."""
    model = save(tmp_path / "model")
    before = Checkpoint(model)
    for quantization in INTEGERS if save in (save_olmoe, save_deepseek_v3) else INTEGERS[:1]:
        quantize(model, tmp_path / quantization, int4=quantization == "int4")
        after = Checkpoint(tmp_path / quantization)
        arithmetic = find_arithmetic(quantization, "float32", before.config.hidden_size, before.config.expert_size)
        layer = before.config.expert_layers()[-1]
        hashes = [arithmetic.prepare(each.expert(layer, 1)).content_hash() for each in (before, after)]
        assert hashes[0] == hashes[1] == after.stored_hash(layer, 1, int4=quantization == "int4")
        assert not any(isinstance(matrix, Tensor) for matrix in after.expert(layer, 1).matrices)
        mode = find_modes([quantization])[0]
        with torch.inference_mode():
            assert torch.equal(*(Evaluated(each, mode, "float32").logits(TOKENS) for each in (before, after)))


@pytest.mark.parametrize("save", [save_gpt_oss, save_granitemoe])
def test_families_without_separate_experts_are_refused_by_name(save: Callable[[Path], Path], tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"cannot write (gpt_oss|granitemoe) models: the experts of a layer are"):
        quantize(model, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_experts_in_int4(tmp_path: Path) -> None:
    model = save_qwen3_moe(tmp_path / "model", mlp_only_layers=[1], num_hidden_layers=3)
    assert main(["quantize", str(model), str(tmp_path / "int4"), "--format", "int4"]) == 0
    before, after = Checkpoint(model), Checkpoint(tmp_path / "int4")
    sizes = after.config.hidden_size, after.config.expert_size
    int4, int8 = (find_arithmetic(quantization, "float32", *sizes) for quantization in ("int4", "int8"))
    for layer in (0, 2):
        for expert in range(6):
            found = after.expert(layer, expert)
            assert all(isinstance(matrix, Int4Rows) and matrix.group == 32 for matrix in found.matrices)
            prepared = int4.prepare(found)
            assert after.stored_hash(layer, expert, int4=True) == prepared.content_hash()
            assert after.stored_hash(layer, expert) is None, "int8 experts of this model are others"
            floats = int8.prepare(ExpertTensors(*found.floats()))
            assert int8.prepare(found).content_hash() == floats.content_hash()
    assert all(isinstance(matrix, Quantized) for matrix in after.dense(1).matrices)
    assert isinstance(after.matrix("lm_head.weight", (384, 64)), Quantized)
    tokens = torch.randint(384, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        scores = evaluate(after, before, find_modes(["int4", "int8"]), [tokens], "float32")
    assert all(1e-4 < score.divergence < 0.15 for score in scores[1:])
