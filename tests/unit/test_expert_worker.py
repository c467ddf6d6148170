"""Starting a worker: what it reads, and what it refuses with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from consilium.config import load_config
from consilium.errors import CheckpointError
from expert_service.__main__ import main, parse_arguments
from expert_service.server import Worker
from tests.tiny_models import save_mixtral


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("worker") / "tiny")


def worker(model: Path, **overrides: str) -> Worker:
    return Worker(load_config(environ={}, overrides={"model": str(model), "worker.threads": 1, **overrides}))


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "consilium.yaml"
    file.write_text("quantization: int8\nworker: {port: 7000, layers: '1'}\n")
    flags = ["--config", str(file), "--quantization", "none", "--port", "0", "--experts", "0-2", "--threads", "3"]
    config = parse_arguments(flags)
    assert (config.quantization, config.worker.port, config.worker.layers) == ("none", 0, "1")
    assert (config.worker.experts, config.worker.threads) == ("0-2", 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0-9"], "worker.layers: '0-9' is out of range; the model has 0-2"),
        (["--experts", "x"], "worker.experts: 'x' is not understood"),
        (["--quantization", "int3"], "quantization: "),
        (["--port", "99999"], "worker.port: "),
        (["--threads", "0"], "worker.threads: "),
        (["--model", "no-such-model"], "model: there is no folder 'no-such-model'"),
        (["--config", "absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    model: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), *flags]) == 1
    printed = capsys.readouterr()
    assert f"error: {message}" in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_a_group_that_is_not_configured(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "consilium.yaml"
    file.write_text("experts: {vision: {endpoint: 'grpc://a:1', max_batch: 32}, language: {endpoint: 'grpc://b:1'}}\n")
    assert main(["--model", str(model), "--config", str(file)]) == 1
    assert "'experts' is not under experts: in the configuration; choose one of language, vision" in (
        capsys.readouterr().err
    )
    config = parse_arguments(["--model", str(model), "--config", str(file), "--group", "vision"])
    assert Worker(config).describe().max_batch == 32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    folder = save_mixtral(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][5, 6] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors: tensor model\.layers\.1\..*\.experts\.2\.w3\.weight: .* found {value} at \[5, 6\]",
    ):
        worker(folder)
    assert worker(folder, **{"worker.experts": "0-1,3"}).describe().layers[1].experts == [0, 1, 3]


def test_only_the_experts_held_are_read(model: Path, tmp_path: Path) -> None:
    """Every other tensor is in a shard that is not there."""
    folder = tmp_path / "part"
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    held = {name: tensors[name] for name in tensors if ".2.block_sparse_moe.experts.1." in name}
    assert len(held) == 3
    save_file(held, folder / "held.safetensors")
    weight_map = {name: "held.safetensors" if name in held else "absent.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((model / "config.json").read_text())
    description = worker(folder, **{"worker.layers": "2", "worker.experts": "1"}).describe()
    assert [(each.layer, list(each.experts)) for each in description.layers] == [(2, [1])]
    with pytest.raises(CheckpointError, match=r"absent\.safetensors is missing"):
        worker(folder, **{"worker.layers": "2"})


def test_replicas_have_equal_hashes_and_ids_of_their_own(model: Path) -> None:
    first, second = worker(model).describe(), worker(model).describe()
    assert list(first.layers) == list(second.layers)
    assert first.worker_id != second.worker_id


def test_hashes_are_of_the_weights_as_computed_with(model: Path) -> None:
    def first_hash(**overrides: str) -> bytes:
        return worker(model, **overrides).describe().layers[0].hashes[0]

    hashes = {first_hash(), first_hash(quantization="none"), first_hash(quantization="none", dtype="bfloat16")}
    assert len(hashes) == 3
    assert first_hash(dtype="bfloat16") == first_hash()  # the same int8 weights, whatever the replies are
