"""A model that is wrong stops both programs with one line that says what, where and what to do; no port opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.model_folder import UNFINISHED
from tests.stack import launch
from tests.tiny_models import save_mixtral

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"


def change(name: str, new: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensor = new(tensors.pop(name))
        if tensor is not None:
            tensors[name] = tensor.contiguous()
        save_file(tensors, folder / "model.safetensors")

    return damage


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change_one(tensor: Tensor) -> Tensor:
        tensor[3, 4] = value
        return tensor

    return change_one


def configure(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def half_written(folder: Path) -> None:
    (folder / UNFINISHED).write_text("{}")


FILE = "model.safetensors"
WORKER: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "cut short": (cut_short, [FILE, "is damaged or cut short", "download it again"]),
    "half written": (half_written, ["is half written", "consilium quantize MODEL"]),
    "wrong shape": (change(EXPERT, lambda t: t[:-1]), [FILE, EXPERT, "expected shape [48, 64], found [47, 64]"]),
    "missing": (change(EXPERT, lambda _: None), [EXPERT, "is missing"]),
    "nan": (change(EXPERT, put(torch.nan)), [FILE, EXPERT, "expected finite numbers, found nan at [3, 4]"]),
    "lying sizes": (configure(intermediate_size=64), [FILE, "expected shape [64, 64], found [48, 64]", "config.json"]),
    "lying experts": (configure(num_local_experts=5), ["expert 4 of layer 0 is missing"]),
}
GATEWAY: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "cut short": WORKER["cut short"],
    "half written": WORKER["half written"],
    "wrong shape": (change(QUERY, lambda t: t[:, :-1]), [FILE, QUERY, "expected shape [64, 64], found [64, 63]"]),
    "missing": (change(QUERY, lambda _: None), [f"tensor {QUERY} is missing"]),
    "infinite": (change(QUERY, put(-torch.inf)), [FILE, QUERY, "expected finite numbers, found -inf at [3, 4]"]),
    "lying sizes": (configure(vocab_size=999), [FILE, "embed_tokens", "expected shape [999, 64], found [384, 64]"]),
    "lying layers": (configure(num_hidden_layers=4), ["model.layers.3.", "is missing"]),
    "tokenizer": (configure(vocab_size=300), ["tokenizer.json has token ids up to", "vocab_size is 300"]),
}


def refusal(arguments: list[str]) -> str:
    """The only line of a program that ends with 1 and has announced no address."""
    process = launch(arguments)
    assert process.wait(60.0) == 1
    assert process.popen.stdout is not None
    assert process.popen.stdout.read() == "", "it announced an address"
    assert "Traceback" not in process.log()
    (line,) = [line for line in process.log().splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("fault", WORKER)
def test_a_worker_refuses(tmp_path: Path, fault: str) -> None:
    damage, words = WORKER[fault]
    folder = save_mixtral(tmp_path / "model")
    damage(folder)
    line = refusal(["expert_service", "--model", str(folder), "--port", "0", "--threads", "1"])
    assert all(word in line for word in [*words, str(folder)]), line


@pytest.mark.parametrize("fault", GATEWAY)
def test_a_gateway_refuses(tmp_path: Path, fault: str) -> None:
    damage, words = GATEWAY[fault]
    folder = save_mixtral(tmp_path / "model")
    damage(folder)
    flags = ["--port", "0", "--threads", "1", "--group-endpoint", "experts=grpc://127.0.0.1:9"]
    line = refusal(["gateway", "--model", str(folder), *flags])
    assert all(word in line for word in [*words, str(folder)]), line
