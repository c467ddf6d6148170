from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError
from tests.tiny_models import save_mixtral, save_qwen3_moe

Save = Callable[..., Path]


def rewrite(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Replace the folder's weights, in ``shards`` files."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    for shard, file in enumerate(files):
        save_file({name: tensors[name] for name in names[shard::shards]}, folder / file)
    weight_map = {name: files[position % shards] for position, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def fuse(tensors: dict[str, Tensor], prefix: str, gate_up: str, down: str, names: tuple[str, str, str]) -> None:
    """Put every layer's experts into one tensor each, as transformers holds them: [E, 2F, D], the gate's rows first."""
    gate, up, out = names
    layer = 0
    while f"model.layers.{layer}.{prefix}.experts.0.{gate}.weight" in tensors:
        base = f"model.layers.{layer}.{prefix}"
        count = sum(name.startswith(f"{base}.experts.") and name.endswith(f".{gate}.weight") for name in tensors)

        def take(name: str, expert: int, base: str = base) -> Tensor:
            return tensors.pop(f"{base}.experts.{expert}.{name}.weight")

        pairs = [torch.cat([take(gate, expert), take(up, expert)]) for expert in range(count)]
        tensors[f"{base}.{gate_up}"] = torch.stack(pairs)
        tensors[f"{base}.{down}"] = torch.stack([take(out, expert) for expert in range(count)])
        layer += 1


def all_experts(checkpoint: Checkpoint) -> list[list[Tensor]]:
    return [
        list(checkpoint.expert(layer, expert).floats())
        for layer in checkpoint.config.expert_layers()
        for expert in range(checkpoint.config.num_experts)
    ]


def assert_same(first: list[list[Tensor]], second: list[list[Tensor]]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


MIXTRAL = ("block_sparse_moe", ("w1", "w3", "w2"))
QWEN = ("mlp", ("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize(("save", "family"), [(save_mixtral, MIXTRAL), (save_qwen3_moe, QWEN)])
@pytest.mark.parametrize(
    ("gate_up", "down"),
    [("experts.gate_up_proj", "experts.down_proj"), ("input_linear.weight", "output_linear.weight")],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_gives_the_same_experts(
    tmp_path: Path, save: Save, family: tuple[str, tuple[str, str, str]], gate_up: str, down: str, shards: int
) -> None:
    folder = save(tmp_path / "model")
    separate = [[tensor.clone() for tensor in each] for each in all_experts(Checkpoint(folder))]
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(separate[0][0], tensors[f"model.layers.0.{family[0]}.experts.0.{family[1][0]}.weight"])
    fuse(tensors, family[0], gate_up, down, family[1])
    assert not any(".experts.0." in name for name in tensors)
    rewrite(folder, tensors, shards)
    assert_same(all_experts(Checkpoint(folder)), separate)


def test_reads_what_transformers_saves_as_it_holds_it(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    folder = save_mixtral(tmp_path / "model")
    expected = all_experts(Checkpoint(folder))
    model = MixtralForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "held", save_original_format=False)
    held = Checkpoint(tmp_path / "held")
    assert_same(all_experts(held), expected)
    router = held.names.router.format(layer=0)
    assert router in held
    assert held.shape(router) == (4, 64)
    assert torch.equal(held.tensor(router, (4, 64)), model.model.layers[0].mlp.gate.weight)


def test_a_dense_layer(tmp_path: Path) -> None:
    folder = save_qwen3_moe(tmp_path / "model", mlp_only_layers=[1])
    checkpoint = Checkpoint(folder)
    assert checkpoint.config.expert_layers() == [0, 2]
    assert [list(each.shape) for each in checkpoint.dense(1).floats()] == [[80, 64], [80, 64], [64, 80]]
    with pytest.raises(CheckpointError, match=r"layer 0 .* no dense FFN"):
        checkpoint.dense(0)


def test_dtype_is_the_one_on_disk(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    rewrite(folder, {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()})
    assert Checkpoint(folder).expert(0, 0).floats()[0].dtype == torch.bfloat16


def test_both_dialects_of_the_config_are_one_model(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    newer = Checkpoint(folder).config
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).config == newer
    assert newer.rope.theta == 5000.0


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    first = Checkpoint(folder).fingerprint
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert Checkpoint(folder).fingerprint == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert Checkpoint(folder).fingerprint != first
    assert len(bytes.fromhex(first)) == 32


@pytest.mark.parametrize(("stated", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, (1,))])
def test_end_of_sequence_of_the_generation_config(tmp_path: Path, stated: object, expected: tuple[int, ...]) -> None:
    folder = save_mixtral(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert Checkpoint(folder).config.eos_token_ids == expected


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_elsewhere(folder: Path) -> None:
    text = json.dumps({"weight_map": {"lm_head.weight": "../other/model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (write("config.json", "{"), r"config\.json is not valid JSON"),
        (write("config.json", "[]"), r"config\.json must hold a JSON object"),
        (write("generation_config.json", '{"eos_token_id": "no"}'), r"generation_config\.json: eos_token_id"),
        (set_config(quantization_config={"quant_method": "hqq"}), r"config\.json: .*'hqq'.* not supported"),
        (set_config(quantization_config=[8]), r"config\.json: .*\[8\].* not supported"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (only_pickle, r"pickle \(pytorch_model\.bin\).*refused"),
        (cut_short, r"model\.safetensors is damaged or cut short"),
        (write("model.safetensors", "x"), r"model\.safetensors is damaged or cut short"),
        (write("model.safetensors.index.json", "{}"), r"index\.json: weight_map"),
        (index_elsewhere, r"'\.\./other/model\.safetensors'"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = save_mixtral(tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_missing_shard_is_named_when_it_is_needed(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, tensors, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    checkpoint = Checkpoint(folder)
    names = sorted(tensors)
    assert torch.equal(checkpoint.tensor(names[0], tuple(tensors[names[0]].shape)), tensors[names[0]])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        checkpoint.shape(names[1])


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    rewrite(folder, load_file(folder / "model.safetensors"), shards=2)
    index = folder / "model.safetensors.index.json"
    swapped = {"00001-of": "00002-of", "00002-of": "00001-of"}
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = content["weight_map"]["lm_head.weight"].replace(
        *next(pair for pair in swapped.items() if pair[0] in content["weight_map"]["lm_head.weight"])
    )
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is missing although"):
        Checkpoint(folder).shape("lm_head.weight")


def test_tensors_are_checked(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int64)
    tensors["model.layers.0.input_layernorm.weight"][7] = torch.nan
    tensors["model.layers.2.block_sparse_moe.experts.3.w1.weight"][4:, 5] = torch.inf
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    rewrite(folder, tensors)
    checkpoint = Checkpoint(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor lm_head\.weight: .*\[384, 63\].*\[384, 64\]"
    ):
        checkpoint.tensor("lm_head.weight", (384, 63))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight: expected one of F32, .* found I64"):
        checkpoint.tensor("model.norm.weight", (64,))
    with pytest.raises(CheckpointError, match=r"tensor model\.absent is missing"):
        checkpoint.tensor("model.absent", (1,))
    with pytest.raises(CheckpointError, match=r"expert 2 of layer 1 is missing; looked for model\.layers\.1\."):
        checkpoint.expert(1, 2)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.input_layernorm\.weight: .*finite.* found nan at \[7\] and 1 "
    ):
        checkpoint.tensor("model.layers.0.input_layernorm.weight", (64,))
    with pytest.raises(CheckpointError, match=r"experts\.3\.w1\.weight: .*finite.* found inf at \[4, 5\] and 44 such"):
        checkpoint.expert(2, 3)


def test_a_fused_expert_that_is_not_finite_is_named_with_its_place(tmp_path: Path) -> None:
    folder = save_qwen3_moe(tmp_path / "model")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    fuse(tensors, "mlp", "experts.gate_up_proj", "experts.down_proj", QWEN[1])
    tensors["model.layers.1.mlp.experts.down_proj"][3, 4, 5] = -torch.inf
    rewrite(folder, tensors)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: .* found -inf at \[3, 4, 5\]"):
        Checkpoint(folder).expert(1, 3)
    assert len(Checkpoint(folder).expert(1, 2).floats()) == 3


def test_one_fused_expert_reads_only_its_own_bytes(tmp_path: Path) -> None:
    """Seen in the process's resident file pages: 1 of 32 experts must not bring in the other 31."""
    folder = save_mixtral(tmp_path / "model", num_local_experts=32, intermediate_size=2048, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    fuse(tensors, "block_sparse_moe", "experts.gate_up_proj", "experts.down_proj", MIXTRAL[1])
    size = sum(
        tensors[f"model.layers.0.block_sparse_moe.experts.{name}"].nbytes for name in ("gate_up_proj", "down_proj")
    )
    rewrite(folder, tensors)
    del tensors
    checkpoint = Checkpoint(folder)
    before = resident_file_bytes(folder / "model.safetensors")
    assert checkpoint.expert(0, 7).floats()[0].sum().isfinite()
    assert (
        resident_file_bytes(folder / "model.safetensors") - before < size / 4
    )  # two tensors, and the system maps some pages around what is touched


def resident_file_bytes(file: Path) -> int:
    """How much of ``file`` is in this process's page tables."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
