"""`consilium inspect`: what it says equals what is in the files, and what is in memory once it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from consilium.checkpoint import Checkpoint
from consilium.cli import main
from consilium.config import has_integer_rows
from consilium.errors import CheckpointError, ConfigError
from consilium.experts import Arithmetic
from consilium.float_experts import FloatArithmetic
from consilium.inspect.parts import count_active, count_parameters
from consilium.inspect.served import MODES, PROCESS, Mode, served_bytes
from consilium.inspect.split import Need, suggest_split, usable
from consilium.inspect.stored import stored_bytes, stored_tensors
from consilium.int4_experts import GroupedProduct, Int4Arithmetic
from consilium.int8_experts import Int8Arithmetic
from consilium.integer_product import IntegerProduct, find_integer_product
from consilium.memory import usable_memory
from consilium.model_folder import read_model_folder
from consilium.shapes.folder import parse_shape
from consilium.tensor_header import read_header
from consilium.weight_only import WeightOnlyArithmetic
from consilium.wire import ROW_DTYPES
from gateway.arithmetic import Arithmetic as GatewayArithmetic
from gateway.model import Model
from gateway.worker import ExpertSource
from tests.parity.test_model import SHAPES
from tests.tiny_models import save_deepseek_v3, save_gpt_oss, save_mixtral, save_qwen2_moe

GIB = 2**30


@pytest.fixture(scope="module")
def product() -> IntegerProduct:
    return find_integer_product()


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "mixtral-top1-tied",
        "qwen3-some-dense",
        "qwen3-tied-window",
        "olmoe",
        "qwen2-window",
        "deepseek",
        "deepseek-v2-lite",
        "deepseek-v3-yarn",
        "gpt-oss",
        "granite-tied",
        "phimoe",
        "phimoe-window",
        "ernie",
        "glm4",
        "minimax-m2",
    ],
)
def test_every_parameter_in_the_files_is_counted_in_its_group(name: str, tmp_path: Path) -> None:
    save, overrides = SHAPES[name]
    model = read_model_folder(save(tmp_path, **overrides))
    tensors = stored_tensors(model)
    assert tensors is not None
    stored = stored_bytes(tensors, model.family.names, model.config.num_layers)
    assert {group: of["F32"] // 4 for group, of in stored.items()} == count_parameters(model.config)


def test_active_leaves_out_the_experts_that_a_token_does_not_go_to() -> None:
    config = parse_shape("shape:olmoe-1b-7b")
    shape = read_model_folder(config)
    assert sum(count_parameters(shape.config).values()) / 1e9 == pytest.approx(6.92, abs=0.01)
    assert count_active(shape.config) / 1e9 == pytest.approx(1.28, abs=0.01)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("save", [save_mixtral, save_gpt_oss])
def test_experts_take_the_bytes_that_are_said(save: Any, mode: Mode, tmp_path: Path, product: IntegerProduct) -> None:
    checkpoint = Checkpoint(save(tmp_path))
    config = checkpoint.config
    dtype = ROW_DTYPES[mode.dtype]
    arithmetics: dict[str, Arithmetic] = {
        "none": FloatArithmetic(dtype),
        "int8": Int8Arithmetic(dtype, product),
        "int8-weight-only": WeightOnlyArithmetic(dtype),
        "int4": Int4Arithmetic(dtype, GroupedProduct(product.kind)),
    }
    arithmetic = arithmetics[mode.quantization]
    found = sum(
        arithmetic.prepare(checkpoint.expert(layer, expert)).nbytes()
        for layer in config.expert_layers()
        for expert in range(config.num_experts)
    )
    assert found == served_bytes(config, mode)["experts"]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("save", "overrides"),
    [
        (save_mixtral, {}),
        (save_mixtral, {"tie_word_embeddings": True}),
        (save_qwen2_moe, {"mlp_only_layers": [1]}),
        (save_deepseek_v3, {}),
    ],
)
def test_the_gateway_takes_the_bytes_that_are_said(
    save: Any, overrides: dict[str, Any], mode: Mode, tmp_path: Path, product: IntegerProduct
) -> None:
    """But for gates that route, and tables of angles."""
    checkpoint = Checkpoint(save(tmp_path, **overrides))
    arithmetic = GatewayArithmetic(
        ROW_DTYPES[mode.dtype],
        product if mode.dense == "int8" else None,
        product if has_integer_rows(mode.quantization) else None,
    )
    model = Model(checkpoint, arithmetic, cast("ExpertSource", None))
    # Each once, whoever holds it; a view of the mapped file counts with its own bytes.
    storages = {each.data_ptr(): each.nbytes for each in _tensors(model, set())}
    said = served_bytes(checkpoint.config, mode)
    dense = sum(nbytes for group, nbytes in said.items() if group not in ("gates", "experts"))
    assert sum(storages.values()) == dense


def _tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor of the gateway's objects, but for gates and rope."""
    if id(thing) in seen or type(thing).__name__ in ("Gate", "Rope"):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from _tensors(each, seen)
    elif type(thing).__module__.startswith("gateway."):
        for each in vars(thing).values() if hasattr(thing, "__dict__") else ():
            yield from _tensors(each, seen)


@given(
    st.integers(1, 64),
    st.integers(GIB // 8, 4 * GIB),
    st.lists(st.integers(GIB, 64 * GIB), min_size=1, max_size=6),
)
def test_a_split_holds_every_expert_once_within_memory(experts: int, expert: int, machines: list[int]) -> None:
    need = Need(gateway=2 * GIB, expert=expert, experts=experts)
    if _at_most(need, machines) < experts:
        with pytest.raises(ConfigError, match="--machines: "):
            suggest_split(need, machines)
        return
    shares = suggest_split(need, machines)
    assert [each for share in shares for each in share.experts] == list(range(experts))
    assert [share.gateway for share in shares].count(True) == 1
    assert all(share.used <= usable(share.memory) for share in shares)


def _at_most(need: Need, machines: list[int]) -> int:
    """Experts that there is room for, wherever the gateway is."""
    free = [usable(memory) - PROCESS for memory in machines]
    places = [index for index, room in enumerate(free) if room >= need.gateway]
    return max(
        (
            sum(max(0, room - (i == at) * (need.gateway + PROCESS)) // need.expert for i, room in enumerate(free))
            for at in places
        ),
        default=-1,
    )


def test_equal_machines_share_evenly_and_the_gateway_takes_the_roomiest() -> None:
    need = Need(gateway=4 * GIB, expert=GIB, experts=12)
    small, large = 8 * GIB, 16 * GIB
    assert [len(share.experts) for share in suggest_split(need, [small, small, large])] == [4, 4, 4]
    assert [share.gateway for share in suggest_split(need, [small, small, large])] == [False, False, True]
    assert [len(share.experts) for share in suggest_split(need, [large, 2 * GIB, small])] == [6, 1, 5]
    with pytest.raises(ConfigError, match=r"room for 2 of 12 experts of every layer; 11\.1 GiB more"):
        suggest_split(need, [small])
    with pytest.raises(ConfigError, match=r"none of them has room for the gateway, which needs one of 5\.0 GiB"):
        suggest_split(need, [4 * GIB] * 9)


def test_the_command_prints_json_from_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--json", "--memory", "4GiB,64GiB", "--machines", "8GiB,4GiB"]
    assert main(["inspect", "shape:olmoe-1b-7b", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"]["experts"] == {"I8": 16 * 64 * 3 * 2048 * 1024, "F32": 16 * 64 * 4 * (2 * 1024 + 2048)}
    assert [each["fits"] for each in found["served"]] == [{str(4 * GIB): False, str(64 * GIB): True}] * 3
    assert [each["experts"] for each in found["split"]["machines"]] == ["0-31", "32-63"]
    assert main(["inspect", "shape:tiny"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_a_folder_without_weights_is_inspected_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_mixtral(tmp_path)
    (folder / "model.safetensors").unlink()
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"] is None
    assert found["parameters"]["total"] == sum(count_parameters(read_model_folder(folder).config).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shape:tiny", "--machines", "plenty"], "--machines plenty: expected a number with a unit"),
        (["shape:tiny", "--machines", "1GiB"], "none of them has room for the gateway"),
        (["shape:tiny", "--quantization", "none"], "is int8 on disk"),
        (["nowhere"], "there is no folder"),
    ],
)
def test_what_cannot_be_said_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]", (9).to_bytes(8, "little") + b'{"a": {}}']
)
def test_a_damaged_header_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        read_header(file)


def test_a_container_has_the_memory_it_is_given(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("1048576\n")
    assert usable_memory(limit) == 1048576
    limit.write_text("max\n")
    assert usable_memory(limit) == usable_memory(tmp_path / "missing") > 2**26


def test_torch_is_not_needed_for_a_folder(tmp_path: Path) -> None:
    folder = save_mixtral(tmp_path)
    program = (
        "import sys\nfrom consilium.cli import main\nassert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, "inspect", str(folder), "--json"], check=True, capture_output=True)
