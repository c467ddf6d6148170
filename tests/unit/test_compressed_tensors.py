"""Checkpoints that are int8 on disk: what is read, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.compressed_tensors import quantization_config
from consilium.errors import CheckpointError
from consilium.quantization import Quantized, quantize_weight
from tests.tiny_models import save_mixtral

# As llm-compressor 0.12 writes it for its W8A8 scheme, with every key spelt out.
PUBLISHED: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "input_activations": {
                "actorder": None,
                "block_structure": None,
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "observer": None,
                "observer_kwargs": {},
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.13.0",
}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3"
QUERY = "model.layers.0.self_attn.q_proj"


def quantize_folder(folder: Path, stated: dict[str, Any], change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Make the folder's projections int8, with ``stated`` as its quantization_config."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name or ".experts." in name]:
        values, scales = quantize_weight(tensors[name])
        tensors[name] = values
        tensors[name.removesuffix(".weight") + ".weight_scale"] = scales[:, None].bfloat16()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_mixtral(tmp_path / "model")


@pytest.mark.parametrize("stated", [PUBLISHED, quantization_config(["lm_head"])])
def test_int8_matrices_are_read_with_their_scales(folder: Path, stated: dict[str, Any]) -> None:
    plain = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint(quantize_folder(folder, stated, lambda _: None))
    assert checkpoint.int8
    expected = quantize_weight(plain[f"{EXPERT}.weight"])
    found = checkpoint.expert(1, 2).up
    assert isinstance(found, Quantized)
    assert torch.equal(found.values, expected.values)
    assert found.scales.dtype == torch.float32
    assert torch.equal(found.scales, expected.scales.bfloat16().float())
    query = checkpoint.matrix(f"{QUERY}.weight", (64, 64))
    assert isinstance(query, Quantized)
    head = checkpoint.matrix("lm_head.weight", (384, 64))
    assert isinstance(head, Tensor)
    assert torch.equal(head, plain["lm_head.weight"])


def test_int8_matrices_are_views_of_the_mapped_file(folder: Path) -> None:
    """So a worker is ready in seconds, and workers of one machine share the memory. The few scales are copied."""
    checkpoint = Checkpoint(quantize_folder(folder, PUBLISHED, lambda _: None))
    for matrix in checkpoint.expert(2, 3).matrices:
        assert isinstance(matrix, Quantized)
        assert is_mapped(matrix.values, folder / "model.safetensors")
        assert matrix.scales.data_ptr() % 4 == 0


def is_mapped(tensor: Tensor, file: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return True
    return False


def test_floats_of_an_int8_checkpoint_are_refused_with_the_choices(folder: Path) -> None:
    checkpoint = Checkpoint(quantize_folder(folder, PUBLISHED, lambda _: None))
    with pytest.raises(CheckpointError, match=r"int8 on disk.*quantization int8 or int8-weight-only"):
        checkpoint.expert(0, 0).floats()
    with pytest.raises(CheckpointError, match=r"w3\.weight: expected one of F32, .* found I8"):
        checkpoint.tensor(f"{EXPERT}.weight", (48, 64))


def test_int8_without_saying_so_is_refused(folder: Path) -> None:
    quantize_folder(folder, {}, lambda _: None)
    assert not Checkpoint(folder).int8
    with pytest.raises(CheckpointError, match=r"w1\.weight: expected one of F32, .* found I8"):
        Checkpoint(folder).expert(0, 0)


def scale(value: float | None, shape: tuple[int, ...] = (48, 1)) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        if value is None:
            del tensors[f"{EXPERT}.weight_scale"]
            return
        tensors[f"{EXPERT}.weight_scale"] = torch.ones(shape)
        tensors[f"{EXPERT}.weight_scale"].view(-1)[3] = value

    return change


def other_kind(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"].to(torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale(None), r"tensor model.*\.w3\.weight_scale is missing"),
        (scale(torch.nan), r"model\.safetensors: tensor .*w3\.weight_scale: .*finite.* found nan at \[3, 0\]"),
        (scale(-torch.inf), r"model\.safetensors: tensor .*w3\.weight_scale: .*finite.* found -inf at \[3, 0\]"),
        (scale(-0.5), r"model\.safetensors: tensor .*w3\.weight_scale: .*found -0\.5 in row 3"),
        (scale(1, (48, 2)), r"w3\.weight_scale: expected shape \[48, 1\], found \[48, 2\]"),
        (other_kind, r"w3\.weight: expected one of I8, found U8"),
    ],
)
def test_bad_int8_tensors_are_named(folder: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    checkpoint = Checkpoint(quantize_folder(folder, PUBLISHED, change))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.expert(1, 2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "nvfp4-pack-quantized", "format is 'nvfp4-pack-quantized', expected 'int-quantized'"),
        ("format", "float-quantized", "quantization_config.weights.type is 'int', expected 'float'"),
        ("format", None, "quantization_config.format is None"),
        ("quantization_status", "frozen", "quantization_status is 'frozen', expected 'compressed' or nothing"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is"),
        ("transform_config", {"config_groups": {}}, "transform_config is"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config.format is 'sparse-24-bitmask'"),
        ("config_groups", {}, "config_groups is empty"),
        ("config_groups", None, "config_groups must be an object"),
        ("config_groups.group_0", 8, "config_groups.group_0 must be an object"),
        ("config_groups.group_0.format", "pack-quantized", "group_0.format is 'pack-quantized'"),
        ("config_groups.group_0.output_activations", {}, "group_0.output_activations is"),
        ("config_groups.group_0.weights", None, "group_0.weights must be an object"),
        ("config_groups.group_0.weights.num_bits", 4, "group_0.weights.num_bits is 4, expected 8"),
        ("config_groups.group_0.weights.type", "float", "weights.type is 'float', expected 'int'"),
        ("config_groups.group_0.weights.symmetric", False, "weights.symmetric is False, expected True"),
        ("config_groups.group_0.weights.symmetric", 1, "weights.symmetric is 1, expected True"),
        ("config_groups.group_0.weights.strategy", "group", "weights.strategy is 'group', expected 'channel'"),
        ("config_groups.group_0.weights.group_size", 128, "weights.group_size is 128, expected nothing or -1"),
        ("config_groups.group_0.input_activations", None, "input_activations must be an object"),
        ("config_groups.group_0.input_activations.dynamic", False, "input_activations.dynamic is False"),
        ("config_groups.group_0.input_activations.strategy", "tensor", "strategy is 'tensor', expected 'token'"),
        ("config_groups.group_0.input_activations.symmetric", None, "symmetric is None, expected True"),
    ],
)
def test_other_schemes_are_refused_by_name(folder: Path, path: str, value: object, message: str) -> None:
    stated = deepcopy(PUBLISHED)
    *parents, key = path.split(".")
    place = stated
    for parent in parents:
        place = place[parent]
    place[key] = value
    quantize_folder(folder, stated, lambda _: None)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert message in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)
    assert "supported: compressed-tensors int-quantized: 8-bit symmetric" in str(caught.value)
