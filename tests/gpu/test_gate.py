"""Gate, combine and sampling on a GPU, against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from consilium import parallel
from consilium.gate import Routing, softmax_top_k
from consilium.kernels import sampling as cpu
from gateway.batches import ExpertOutputs
from gateway.batches import combine as combine_on_cpu
from gateway.gpu import gate as gate_module
from gateway.gpu.combine import combine
from gateway.gpu.gate import route
from gateway.gpu.sampling import draw, largest


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def routed(x: Tensor, gate: Tensor, top_k: int, device: torch.device, *, normalize: bool) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(x), top_k), -1, dtype=torch.int32, device=device)
    weights = torch.full((len(x), top_k), torch.nan, device=device)
    route(x.to(device), gate.to(device), normalize=normalize, ids=ids, weights=weights)
    return ids.cpu(), weights.cpu()


@pytest.mark.parametrize("size", [72, 520], ids=["one part", "parts"])
def test_gate_chooses_and_weighs(device: torch.device, size: int) -> None:
    x, gate = random(18, size), random(6, size, seed=1) / size**0.5
    gate[3], gate[5] = gate[1], gate[1]  # ties go to the lower id
    for normalize in (True, False):
        ids, weights = routed(x, gate, 2, device, normalize=normalize)
        exact = softmax_top_k((x.double() @ gate.double().T).float(), 2, normalize=normalize)
        assert torch.equal(ids.long(), exact.ids)
        torch.testing.assert_close(weights, exact.weights, rtol=1e-5, atol=1e-6)
    alone = routed(x[17:], gate, 2, device, normalize=False)
    assert torch.equal(alone[0], ids[17:])
    assert torch.equal(alone[1], weights[17:])


def test_the_tile_of_many_rows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MANY", gate_module.Tile(32, 32, 32, 8))
    monkeypatch.setattr(gate_module, "MOST_FEW", 4)
    x, gate = random(40, 300), random(36, 300, seed=1) / 16
    ids, weights = routed(x, gate, 3, device, normalize=True)
    exact = softmax_top_k((x.double() @ gate.double().T).float(), 3, normalize=True)
    assert torch.equal(ids.long(), exact.ids)
    torch.testing.assert_close(weights, exact.weights, rtol=1e-5, atol=1e-6)
    few, few_weights = routed(x[38:], gate, 3, device, normalize=True)
    assert torch.equal(few, ids[38:])
    if device.type == "cuda":  # the interpreter's sums are those of a library
        assert torch.equal(few_weights, weights[38:])


def test_a_row_that_is_not_finite_gets_the_first_experts_and_no_weights(device: torch.device) -> None:
    x = random(2, 72)
    x[0, 3] = torch.nan
    ids, weights = routed(x, random(6, 72, seed=1), 3, device, normalize=True)
    assert ids[0].tolist() == [0, 1, 2]
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


def test_combine_has_the_bits_of_the_cpu(device: torch.device) -> None:
    x, weights = random(5, 72), random(5, 3, seed=1)
    for dtype in (torch.bfloat16, torch.float32):
        rows = random(15, 72, seed=2).to(dtype)
        outputs = ExpertOutputs(15, 72, dtype)
        outputs.place(rows, np.arange(15))
        found = x.clone().to(device)
        combine(found, rows.to(device), weights.to(device))
        assert torch.equal(found.cpu(), x + combine_on_cpu(outputs, Routing(torch.zeros(5, 3).long(), weights)))


def test_the_likeliest_token(device: torch.device) -> None:
    logits = random(4, 5000)
    logits[0, [9, 4700]] = 9.0
    logits[1, 4999] = 9.0
    logits[2, 70] = torch.nan
    logits[3, 4200] = -torch.inf
    values, ids = largest(logits.to(device))
    assert ids.tolist() == [9, 4999, -1, -1]
    assert values[:2].tolist() == [9.0, 9.0]


def test_drawn_tokens_are_those_of_the_cpu(device: torch.device) -> None:
    rows, size = 4, 1300
    logits = random(rows, size) * 2
    limits = torch.tensor([[0.7, 0.0, 1.0], [1.3, 0.05, 1.0]] * 2)
    numbers = np.array([0.0, 0.2, 0.77, 1 - 2**-53])
    expected = np.empty(rows, np.int64)
    places = np.array([row.data_ptr() for row in logits], np.int64)
    asked = places, size, limits.numpy(), np.full(rows, size), numbers, expected.ctypes.data
    parallel.share(lambda sharer: cpu.draw(*asked, sharer), 1, 1)
    values, _ = largest(logits.to(device))
    limits = limits[:, :2].contiguous().to(device)
    found = draw(logits.to(device), values, limits, torch.from_numpy(numbers).to(device))
    assert found.tolist() == expected.tolist()
