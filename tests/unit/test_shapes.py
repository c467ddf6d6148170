"""Models without files: names, weights that depend on nothing but their names, and the same weights on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.cli import main
from consilium.config import Config
from consilium.content_hash import content_hash
from consilium.errors import CheckpointError, ConfigError
from consilium.models import resolve_model
from consilium.quantization import Quantized
from consilium.shapes import tensors
from consilium.shapes.folder import Recipe, ShapeFolder, parse_shape
from consilium.shapes.sizes import SHAPES
from consilium.shapes.tokenizer import SMALLEST, tokenizer_json
from consilium.shapes.write import write_shape
from gateway.arithmetic import find_arithmetic as find_gateway_arithmetic
from gateway.batches import ExpertBatches, ExpertOutputs
from gateway.chat_template import load_chat_template
from gateway.evaluate import main as evaluate
from gateway.evaluation import Evaluated, Mode
from gateway.model import Model
from gateway.tokenizer import Tokenizer

TINY = parse_shape("shape:tiny")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_is_a_model_that_is_served(name: str) -> None:
    checkpoint = Checkpoint(parse_shape(name))
    config = checkpoint.config
    assert checkpoint.int8
    assert config.eos_token_ids == ()
    layer = config.expert_layers()[-1]
    expert = checkpoint.expert(layer, config.num_experts - 1)
    assert [matrix.values.shape for matrix in expert if isinstance(matrix, Quantized)] == [
        (config.expert_size, config.hidden_size),
        (config.expert_size, config.hidden_size),
        (config.hidden_size, config.expert_size),
    ]


def test_sizes_are_those_of_the_published_models() -> None:
    def billions(name: str) -> float:
        checkpoint = Checkpoint(parse_shape(name))
        specs = tensors.tensor_specs(checkpoint.config, checkpoint.names)
        return sum(torch.Size(spec.shape).numel() for spec in specs if spec.dtype != "F32") / 1e9

    assert billions("olmoe-1b-7b") == pytest.approx(6.92, abs=0.01)
    assert billions("qwen3-30b-a3b") == pytest.approx(30.53, abs=0.01)
    assert billions("mixtral-8x7b") == pytest.approx(46.70, abs=0.01)


def test_a_name_has_parameters() -> None:
    folder = parse_shape("shape:olmoe-1b-7b,layers=4,experts=16,seed=7")
    config = Checkpoint(folder).config
    assert (config.num_layers, config.num_experts, folder.recipe.seed) == (4, 16, 7)
    assert folder.name == str(folder) == "shape:olmoe-1b-7b,layers=4,experts=16,seed=7"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape:olmo", "no shape 'olmo'; choose from deepseek-v2-lite, default, mixtral-8x7b, olmoe-1b-7b, qwen3"),
        ("shape:", "no shape ''"),
        ("shape:tiny,layer=2", "no parameter 'layer'; choose from layers, experts, seed"),
        ("shape:tiny,layers", "layers of a shape must be a number from 1 to 4096, found ''"),
        ("shape:tiny,layers=0", "must be a number from 1 to 4096, found '0'"),
        ("shape:tiny,seed=-1", "seed of a shape must be a number from 0"),
        ("shape:tiny,seed=1,seed=2", "gives a parameter twice"),
        ("shape:tiny,layers=1", "the first layer has no experts, so layers must be at least 2"),
        ("shape:tiny,experts=1", "each token asks 2 experts, so experts must be at least 2"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(name)


def test_a_folder_comes_before_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shape:tiny").mkdir()
    (tmp_path / "shape:tiny" / "config.json").write_text("{}")
    assert resolve_model("shape:tiny") == TINY
    monkeypatch.chdir(tmp_path)
    assert resolve_model("shape:tiny") == Path("shape:tiny")


def test_a_tensor_depends_on_its_name_alone() -> None:
    alone = content_hash(Checkpoint(TINY).expert(2, 5).matrices)
    all_of_them = Checkpoint(TINY)
    hashes = [content_hash(all_of_them.expert(layer, each).matrices) for layer in (1, 2) for each in range(8)]
    assert hashes[8 + 5] == alone
    assert len(set(hashes)) == 16
    assert content_hash(Checkpoint(parse_shape("tiny,layers=5")).expert(2, 5).matrices) == alone
    assert content_hash(Checkpoint(parse_shape("tiny,seed=1")).expert(2, 5).matrices) != alone


def test_the_weights_stay_what_they_are() -> None:
    """Processes on other machines, and written copies, rely on it; raise folder.VERSION where this must change."""
    assert content_hash(Checkpoint(TINY).expert(2, 5).matrices).hex() == "b0cb337fa99b910c8b4f275bbf4e83e6"


def test_another_seed_is_another_model() -> None:
    prints = {Checkpoint(parse_shape(f"tiny{more}")).fingerprint for more in ("", ",seed=1", ",layers=2", ",seed=2")}
    assert len(prints) == 4
    assert Checkpoint(parse_shape("tiny,seed=0")).fingerprint == Checkpoint(TINY).fingerprint


def test_values_and_scales_keep_the_size_of_what_they_multiply() -> None:
    checkpoint = Checkpoint(parse_shape("olmoe-1b-7b"))
    up = checkpoint.expert(3, 9).up
    assert isinstance(up, Quantized)
    assert up.values.min() == -127
    assert up.values.max() == 127
    assert abs(up.values.float().mean()) < 0.2
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    y = x @ (up.values * up.scales[:, None]).T
    assert y.square().mean().sqrt() == pytest.approx(1.04, abs=0.05)


def test_a_gateway_makes_no_expert_and_a_worker_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = tensors.random_values

    def noting(recipe: Recipe, name: str, shape: tuple[int, ...]) -> NDArray[np.int8]:
        made.append(name)
        return real(recipe, name, shape)

    monkeypatch.setattr(tensors, "random_values", noting)
    checkpoint = Checkpoint(TINY)
    assert not made
    Model(checkpoint, find_gateway_arithmetic(Config(), checkpoint.config), NoExperts())
    assert made
    assert not [name for name in made if ".experts." in name]
    made.clear()
    checkpoint.expert(1, 3)
    assert len(made) == 6
    assert all(name.startswith("model.layers.1.mlp.experts.3.") for name in made)


class NoExperts:
    """Stands where a dispatcher would; nothing is dispatched."""

    async def dispatch(self, layer: int, batches: ExpertBatches) -> tuple[ExpertOutputs, dict[int, Exception]]:
        raise AssertionError(layer, batches)


@pytest.mark.parametrize("name", ["tiny", "tiny,layers=12,experts=32,seed=3"])
def test_logits_are_finite_and_varied(name: str) -> None:
    checkpoint = Checkpoint(parse_shape(name))
    tokens = torch.randint(512, (256,), generator=torch.Generator().manual_seed(1)).tolist()
    logits = Evaluated(checkpoint, Mode("int8", "int8", "int8"), "float32").logits(tokens)
    assert logits.isfinite().all()
    assert 2 < logits.std() < 8
    assert len(set(logits.argmax(dim=1).tolist())) > 64


def test_none_is_refused_for_weights_that_are_int8() -> None:
    arithmetic = find_arithmetic("none", "float32", 64, 48)
    with pytest.raises(CheckpointError, match="these weights are int8"):
        arithmetic.prepare(Checkpoint(TINY).expert(1, 0))


@pytest.mark.anyio
@pytest.mark.parametrize("size", [SMALLEST, SMALLEST + 1, 512, 32000])
async def test_the_tokenizer_has_the_size_of_the_vocabulary(size: int) -> None:
    assert len(json.loads(tokenizer_json(size))["model"]["vocab"]) == size
    text = "Hello, world: naïve café, 日本 🙂 \x00\n  the end"
    folder = ShapeFolder("shape:test", TINY.recipe, {**TINY.config, "vocab_size": size})
    tokenizer = Tokenizer(folder, size)
    [ids] = await tokenizer.encode([text])
    assert max(ids) < size
    assert tokenizer.vocabulary.decode(ids) == text
    assert all(tokenizer.vocabulary.token_bytes(token) for token in range(size))


def test_chat_has_a_template() -> None:
    template = load_chat_template(TINY, Tokenizer(TINY, 512))
    assert template is not None
    text = template.render([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_written_folder_is_the_same_model(tmp_path: Path) -> None:
    write_shape(TINY, tmp_path / "out")
    memory, disk = Checkpoint(TINY), Checkpoint(tmp_path / "out")
    assert disk.fingerprint == memory.fingerprint
    files = (tmp_path / "out").glob("*.safetensors")
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    made = tensors.RandomTensors(TINY.recipe, memory.config, memory.names)
    assert set(written) == set(made)
    for name, tensor in written.items():
        assert tensor.dtype == made.find(name)[:].dtype
        assert torch.equal(tensor, made.find(name)[:]), name
        assert list(tensor.shape) == made.find(name).get_shape()
    for layer in (1, 2):
        for expert in range(8):
            assert disk.stored_hash(layer, expert) == content_hash(memory.expert(layer, expert).matrices)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name for file in (tmp_path / "out").glob("*.json")} == {*TINY.files(), "model.safetensors.index.json"}


def test_floats_are_the_same_weights_rounded_and_can_be_quantized(tmp_path: Path) -> None:
    for flags, out in (([], "int8"), (["--bfloat16"], "float")):
        assert main(["model", "random", "shape:tiny,seed=7", str(tmp_path / out), *flags]) == 0
    born, floats = Checkpoint(tmp_path / "int8"), Checkpoint(tmp_path / "float")
    assert (born.int8, floats.int8) == (True, False)
    assert born.fingerprint != floats.fingerprint
    for layer, expert in ((1, 0), (2, 7)):
        for matrix, rounded in zip(
            born.expert(layer, expert).matrices, floats.expert(layer, expert).floats(), strict=True
        ):
            assert isinstance(matrix, Quantized)
            assert rounded.dtype == torch.bfloat16
            assert torch.equal(rounded, (matrix.values * matrix.scales[:, None]).bfloat16())
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "out")]) == 0
    assert Checkpoint(tmp_path / "out").int8


def test_the_command_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["model", "random", "shape:tiny,layers=2", str(out)]) == 0
    assert Checkpoint(out).config.num_layers == 2
    assert main(["model", "random", "tiny", str(out)]) == 1
    assert "exists already; give another folder" in capsys.readouterr().err


def test_what_needs_floats_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "shape:tiny", str(tmp_path / "out")]) == 1
    assert "shape:tiny has int8 weights already" in capsys.readouterr().err
    assert evaluate(["shape:tiny", "--text", "text"]) == 1
    assert "random weights in int8 alone" in capsys.readouterr().err


def test_a_shape_is_read_without_torch() -> None:
    program = (
        "import sys\nfrom consilium.model_folder import read_model_folder\nfrom consilium.models import resolve_model\n"
        "read_model_folder(resolve_model('shape:tiny'))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
