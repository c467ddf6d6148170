"""The gate while it learns, and int8 seen through by gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from consilium.gate import softmax_top_k
from consilium.quantization import quantize_rows
from training.fake_int8 import fake_int8
from training.gates import GateOptions, balance_loss, choose, collapsed, gate, moved_bias, within_capacity, z_loss
from training.llama import Matrices
from training.student import experts, int8_experts, membership


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_weights_are_k_times_those_that_are_served() -> None:
    logits = _normal(50, 6)
    gated = gate(logits, torch.zeros(6), GateOptions(3))
    served = softmax_top_k(logits, 3, normalize=True)
    torch.testing.assert_close(gated.mix.gather(1, served.ids), 3 * served.weights)
    assert torch.equal((gated.mix > 0).sum(1), torch.full((50,), 3))
    torch.testing.assert_close(gated.load.sum(), torch.tensor(1.0))


def test_balance_loss_is_1_for_even_choices_and_grows_to_e() -> None:
    even = torch.full((4,), 0.25)
    assert float(balance_loss(torch.zeros(10, 4), even)) == pytest.approx(1)
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert float(balance_loss(100 * one.expand(10, 4), one)) == pytest.approx(4)


def test_balance_loss_pushes_busy_experts_down() -> None:
    logits = (_normal(64, 4) + torch.tensor([2.0, 0.0, 0.0, 0.0])).requires_grad_()
    gate(logits, torch.zeros(4), GateOptions(1, aux_weight=1.0)).loss.backward()
    assert logits.grad is not None
    assert logits.grad.sum(0)[0] > 0 > logits.grad.sum(0)[1:].max()


def test_z_loss_is_the_square_of_the_log_of_the_sum() -> None:
    assert float(z_loss(torch.zeros(3, 4))) == pytest.approx(1.3862943611**2)


def test_bias_moves_choices_and_no_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    gated = gate(logits, torch.tensor([0.0, 0.0, 5.0]), GateOptions(2))
    assert gated.mix[0].gt(0).tolist() == [True, False, True]
    torch.testing.assert_close(gated.mix[0, [0, 2]], 2 * torch.softmax(torch.tensor([2.0, 0.0]), 0))


def test_bias_evens_out_a_gate_that_prefers_one_expert() -> None:
    logits, bias = _normal(400, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.zeros(4)
    before = gate(logits, bias, GateOptions(1)).load
    for _ in range(100):
        bias = moved_bias(bias, gate(logits, bias, GateOptions(1)).load, 0.05)
    after = gate(logits, bias, GateOptions(1)).load
    assert before.max() > 0.8
    assert after.max() < 0.35


def test_noise_lets_every_expert_have_a_turn() -> None:
    logits = torch.tensor([0.5, 0.0, 0.0, 0.0]).expand(400, 4)
    torch.manual_seed(0)
    assert gate(logits, torch.zeros(4), GateOptions(1)).load[1:].max() == 0
    assert gate(logits, torch.zeros(4), GateOptions(1, noise=1.0)).load.min() > 0.1


def test_capacity_keeps_the_highest_logits() -> None:
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    chosen = choose(logits, 1)
    kept = within_capacity(logits, chosen, 1.0, 1)  # 2 places an expert
    assert kept[:, 0].tolist() == [True, True, False, False]
    assert kept[:, 1].tolist() == [False, False, False, True]
    mix = gate(logits, torch.zeros(2), GateOptions(1, capacity=1.0)).mix
    assert mix[2].tolist() == [0, 0], "a token that finds no place passes by the experts"


def test_collapse_is_half_of_the_experts_without_tokens() -> None:
    load = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.499, 0.0005, 0.0005], [0.4, 0.3, 0.3, 0.0]])
    assert collapsed(load) == [1]


def test_fake_int8_is_what_is_served_bit_for_bit() -> None:
    x = _normal(20, 33) * torch.logspace(-30, 10, 20)[:, None]
    x[3], x[4] = 0, 1e-42
    values, scales = quantize_rows(x)
    assert torch.equal(fake_int8(x), values.float() * scales[:, None])


def test_gradients_pass_rounding() -> None:
    x = _normal(4, 8).requires_grad_()
    (fake_int8(x) * torch.arange(8)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(8.0).expand(4, 8))


def test_int8_experts_round_as_workers_do() -> None:
    """Against the same written with quantize_rows, expert by expert, each weighed at the end."""
    count, size, hidden, tokens = 3, 5, 7, 11
    gate_matrix, up, down = _normal(count * size, hidden), _normal(count * size, hidden), _normal(hidden, count * size)
    none = torch.zeros(1)
    w = Matrices(none, none, none, none, gate_matrix, up, down)
    x, mix = _normal(tokens, hidden), torch.rand(tokens, count)

    def rounded(matrix: Tensor) -> Tensor:
        values, scales = quantize_rows(matrix)
        return values.float() * scales[:, None]

    expected = torch.zeros(tokens, hidden)
    for expert in range(count):
        mine = slice(expert * size, (expert + 1) * size)
        inputs = rounded(x)
        said = torch.nn.functional.silu(inputs @ rounded(gate_matrix[mine]).T) * (inputs @ rounded(up[mine]).T)
        expected += mix[:, expert, None] * (rounded(said) @ rounded(down[:, mine].contiguous()).T)
    spread = membership(count, size, torch.device("cpu"))
    found = int8_experts(x, mix, w, spread)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, experts(x, mix, w, spread), rtol=1e-3)
