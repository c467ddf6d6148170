"""Quantized checkpoints of other makers: what is read equals what their descriptions say, number by number."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from consilium.arithmetics import find_arithmetic
from consilium.checkpoint import Checkpoint
from consilium.errors import CheckpointError
from consilium.experts import compute_expert
from consilium.formats.scheme import Scheme, find_scheme
from consilium.formats.source import DecodedTensors
from consilium.int4 import Int4Rows
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.quantization import quantize_rows
from consilium.tensor_files import TensorFiles
from gateway.arithmetic import Arithmetic
from tests import packers
from tests.local_workers import IntegerRows
from tests.packers import Parts
from tests.parity.test_model import log_probabilities
from tests.tiny_models import save_deepseek_v3, save_gpt_oss, save_mixtral, save_qwen2_moe, save_qwen3_moe

Json = dict[str, Any]
Packer = Callable[[int, int], Parts]  # of a matrix [N, K]


def compressed(form: str, **weights: Any) -> Json:
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


FP8: Json = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 24]}
FLOAT8 = compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy="channel", dynamic=False)
BLOCKS = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 24])
PACKED = compressed("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=16)
PACKED8 = compressed("pack-quantized", num_bits=8, type="int", symmetric=False, strategy="channel")
AWQ: Json = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ: Json = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}
GPTQ_SYMMETRIC: Json = {**GPTQ, "desc_act": False, "sym": True}
GPTQ8: Json = {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}


def whole(rows: int, columns: int) -> Parts:
    """Of float8, one scale for the tensor."""
    parts, weight = packers.fp8(rows, columns, (rows, columns), "weight_scale")
    return {**parts, "weight_scale": parts["weight_scale"].view(1)}, weight


def by_row(rows: int, columns: int) -> Parts:
    return packers.fp8(rows, columns, (1, columns), "weight_scale")


FORMATS: dict[str, tuple[Json, Packer]] = {
    "fp8-blocks": (FP8, partial(packers.fp8, block=(16, 24))),
    "float8-rows": (FLOAT8, by_row),
    "float8-tensor": (FLOAT8, whole),
    "float8-blocks": (BLOCKS, partial(packers.fp8, block=(16, 24), scale="weight_scale")),
    "packed-int4": (PACKED, partial(packers.pack_quantized, bits=4, group=16, zeros=False, order=False)),
    "packed-int4-zeros": (PACKED, partial(packers.pack_quantized, bits=4, group=16, zeros=True, order=False)),
    "packed-int4-order": (PACKED, partial(packers.pack_quantized, bits=4, group=16, zeros=True, order=True)),
    "packed-int8": (PACKED8, lambda n, k: packers.pack_quantized(n, k, 8, k, zeros=True, order=False)),
    "awq": (AWQ, partial(packers.awq, group=16)),
    "gptq": (GPTQ, partial(packers.gptq, bits=4, group=16, order=False)),
    "gptq-act-order": (GPTQ, partial(packers.gptq, bits=4, group=16, order=True)),
    "gptq-int8": (GPTQ8, lambda n, k: packers.gptq(n, k, 8, k, order=False, first_version=False)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_equal_their_description(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    stated, packer = FORMATS[name]
    parts, expected = packer(40, 64)
    save_file({f"x.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    source = DecodedTensors(TensorFiles(tmp_path), find_scheme("config.json", stated))
    assert "x.weight" in source
    found = source.find("x.weight")
    assert (found.get_shape(), found.get_dtype()) == ([40, 64], "F32")
    assert torch.equal(found[:], expected)
    assert torch.equal(found[3:5], expected[3:5])
    assert torch.equal(found[7], expected[7])
    assert expected.std() > 0.01


def test_mxfp4_equals_transformers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    blocks, scales = packers.mxfp4(5, 24, 64)
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    found = DecodedTensors(TensorFiles(tmp_path), Scheme("mxfp4", 4)).find("x")
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found.get_shape() == [5, 64, 24] == list(expected.shape)
    assert torch.equal(found[:], expected)
    assert torch.equal(found[3], expected[3])


def repack(folder: Path, stated: Json, packer: Packer) -> Path:
    """Make the folder's projections quantized; its twin holds what they stand for, as floats."""
    tensors, twin = load_file(folder / "model.safetensors"), {}
    for name in [
        name for name in tensors if "_proj.weight" in name or (".experts." in name and tensors[name].ndim == 2)
    ]:
        weight = tensors.pop(name)
        parts, twin[name] = packer(*weight.shape)
        tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    return save_both(folder, stated, tensors, twin)


def repack_gpt_oss(folder: Path) -> Path:
    tensors, twin = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packers.mxfp4(experts, rows, columns)
        twin[name] = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        ).contiguous()
    return save_both(folder, {"quant_method": "mxfp4"}, tensors, twin)


def save_both(folder: Path, stated: Json, tensors: dict[str, Tensor], decoded: dict[str, Tensor]) -> Path:
    own = load_file(folder / "model.safetensors")
    (folder / "twin").mkdir()
    save_file({name: decoded.get(name, own[name]) for name in own}, folder / "twin" / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "twin" / "config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "deepseek-v3-fp8": lambda folder: repack(save_deepseek_v3(folder), *FORMATS["fp8-blocks"]),
    "gpt-oss-mxfp4": lambda folder: repack_gpt_oss(save_gpt_oss(folder, intermediate_size=64)),
    "qwen3-float8": lambda folder: repack(save_qwen3_moe(folder), *FORMATS["float8-rows"]),
    "qwen3-packed-int4": lambda folder: repack(save_qwen3_moe(folder), *FORMATS["packed-int4-order"]),
    "mixtral-awq": lambda folder: repack(save_mixtral(folder), *FORMATS["awq"]),
    "qwen2-gptq": lambda folder: repack(
        save_qwen2_moe(folder, shared_expert_intermediate_size=64), *FORMATS["gptq-act-order"]
    ),
}


@pytest.fixture(scope="module")
def product() -> IntegerProduct:
    return find_integer_product()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_as_the_floats_that_it_stands_for(name: str, tmp_path: Path, product: IntegerProduct) -> None:
    """From the file to log-probabilities, in floats and in int8, to the last bit."""
    torch.manual_seed(3)
    folder = MODELS[name](tmp_path)
    packed, twin = Checkpoint(folder), Checkpoint(folder / "twin")
    assert packed.scheme is not None
    assert twin.scheme is None
    tokens = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(7))
    floats = [log_probabilities(each, tokens, Arithmetic(torch.float32)) for each in (packed, twin)]
    assert torch.equal(*floats)
    assert floats[0].isfinite().all()
    arithmetic = Arithmetic(torch.float32, product, product)
    int8 = [log_probabilities(each, tokens, arithmetic, IntegerRows(each)) for each in (packed, twin)]
    assert torch.equal(*int8)
    assert not torch.equal(floats[0], int8[0])


def whole_rows(rows: int, columns: int) -> Parts:
    return packers.pack_quantized(rows, columns, 4, columns, zeros=False, order=False)


EXACT: dict[str, tuple[Json, Packer]] = {
    "packed": FORMATS["packed-int4"],
    "packed-rows": (
        compressed("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="channel"),
        whole_rows,
    ),
    "gptq": (GPTQ_SYMMETRIC, partial(packers.gptq, bits=4, group=16, order=False, symmetric=True)),
}


@pytest.mark.parametrize("name", EXACT)
def test_symmetric_int4_is_computed_with_as_it_is(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = repack(save_qwen3_moe(tmp_path), *EXACT[name])
    packed, twin = Checkpoint(folder), Checkpoint(folder / "twin")
    for matrix, floats in zip(packed.expert(1, 2).matrices, twin.expert(1, 2).floats(), strict=True):
        assert isinstance(matrix, Int4Rows)
        assert matrix.group == packed.int4_group == (128 if name == "packed-rows" else 16)
        assert torch.equal(matrix.floats(), floats)
    arithmetic = find_arithmetic("int4", "float32", packed.config.hidden_size, packed.config.expert_size)
    weights, rows = arithmetic.prepare(packed.expert(1, 2)), quantize_rows(torch.randn(5, packed.config.hidden_size))
    found, exact = compute_expert(arithmetic, weights, *rows), find_arithmetic("none", "float32", 8, 8)
    x = rows.values.float() * rows.scales[:, None]
    expected = compute_expert(exact, exact.prepare(twin.expert(1, 2)), x)
    assert (found - expected).norm() / expected.norm() < 2e-2  # of the hidden rows, which become int8


@pytest.mark.parametrize("name", ["packed-int4-zeros", "packed-int4-order", "awq", "gptq", "gptq-act-order"])
def test_other_int4_is_rounded_again(name: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = repack(save_qwen3_moe(tmp_path), *FORMATS[name])
    packed, twin = Checkpoint(folder), Checkpoint(folder / "twin")
    arithmetic = find_arithmetic("int4", "float32", packed.config.hidden_size, packed.config.expert_size)
    assert not any(isinstance(matrix, Int4Rows) for matrix in packed.expert(1, 2).matrices)
    hashes = {arithmetic.prepare(each.expert(1, 2)).content_hash() for each in (packed, twin)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({**FP8, "fmt": "e5m2"}, "fmt is 'e5m2', expected 'e4m3' or nothing"),
        ({**FP8, "weight_block_size": [128]}, r"weight_block_size is \[128\], expected two positive numbers"),
        ({**FP8, "weight_block_size": [128, 0]}, "expected two positive numbers"),
        ({**AWQ, "bits": 3}, "bits is 3, expected 4"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv', expected 'gemm'"),
        ({**GPTQ, "bits": 3}, "bits is 3, expected 4 or 8"),
        ({**GPTQ, "group_size": 0}, "group_size is 0, expected a positive number or -1"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "dynamic": {"-:lm_head": {}}}, "dynamic is"),
        (compressed("pack-quantized", num_bits=3, type="int", strategy="group"), "weights.num_bits is 3"),
        (compressed("float-quantized", num_bits=4, type="float", strategy="group"), "weights.num_bits is 4"),
        ({**PACKED, "config_groups": {"group_0": 4}}, "config_groups is .*expected objects with weights"),
        ({"quant_method": "bitsandbytes"}, "quantized with 'bitsandbytes' are not supported; supported: compressed"),
    ],
)
def test_other_schemes_are_refused_by_name(stated: Json, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        find_scheme("config.json", stated)
    assert "supported: compressed-tensors" in str(caught.value)


def drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(parts: dict[str, Tensor]) -> None:
        del parts[part]

    return change


def replace(part: str, by: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(parts: dict[str, Tensor]) -> None:
        parts[part] = by(parts[part]).contiguous()

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8-blocks", drop("weight_scale_inv"), r"x\.weight_scale_inv is missing"),
        ("fp8-blocks", replace("weight_scale_inv", lambda s: s[:1]), r"scales of shape \[1, 3\] do not fit \[40, 64\]"),
        ("packed-int4", replace("weight_packed", lambda w: w[1:]), r"expected shape \[40, 8\], found \[39, 8\]"),
        ("packed-int4", replace("weight_scale", lambda s: s[:, 1:]), "3 groups do not divide 64 inputs evenly"),
        ("packed-int4-order", replace("weight_g_idx", lambda g: g + 1), "expected groups from 0 to 3"),
        ("awq", replace("qzeros", lambda z: z.long()), r"x\.qzeros: expected I32, found I64"),
        ("awq", replace("scales", lambda s: s[1:]), r"x\.qzeros: expected shape \[3, 5\], found \[4, 5\]"),
        ("gptq-act-order", replace("g_idx", lambda g: g - 1), "expected groups from 0 to 3"),
        ("gptq", replace("scales", lambda s: s[:, 1:]), r"x\.scales: expected shape \['any', 40\], found \[4, 39\]"),
    ],
)
def test_parts_that_do_not_fit_are_named(
    name: str, change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    stated, packer = FORMATS[name]
    parts, _ = packer(40, 64)
    change(parts)
    save_file({f"x.{part}": tensor for part, tensor in parts.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        DecodedTensors(TensorFiles(tmp_path), find_scheme("config.json", stated)).find("x.weight")[:]
