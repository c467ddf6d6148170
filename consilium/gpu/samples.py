"""Experts and batches of random numbers, made on the device, to measure with.

Letters: T tokens, K experts of each, E experts, D hidden size, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilium.experts import ExpertWeights
from consilium.gpu.experts import ExpertForm, table_of
from consilium.quantization import Quantized

BATCHES = 6  # of one size: their experts are others where few are chosen, so that no cache has them


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one layer."""

    form: ExpertForm
    experts: Sequence[ExpertWeights]
    table: Tensor  # [E, columns]

    @property
    def expert_bytes(self) -> int:
        return self.experts[0].nbytes()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows, and the experts that they are sent to."""

    ids: Tensor  # [T, K] int32
    rows: Tensor  # [T, D]
    scales: Tensor | None  # [T]


def random_layer(form: ExpertForm, experts: int, device: torch.device, seed: int = 0) -> Layer:
    """Each expert has memory of its own."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor | Quantized:
        shape = (rows, columns)
        if form.weights is torch.int8:
            values = torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
            return Quantized(values, torch.full((rows,), columns**-0.5 / 73, device=device))
        drawn: Tensor = torch.randn(shape, device=device, generator=generator) * columns**-0.5
        return drawn.to(form.weights)

    inner, outer = (form.expert_size, form.hidden_size), (form.hidden_size, form.expert_size)
    made = [ExpertWeights(draw(*inner), draw(*inner), draw(*outer)) for _ in range(experts)]
    return Layer(form, made, table_of(form, made).to(device))


def random_tokens(layer: Layer, tokens: int, per_token: int) -> list[Tokens]:
    """BATCHES of one size; all experts are equally likely."""
    device, experts = layer.table.device, len(layer.experts)
    generator = torch.Generator(device).manual_seed(tokens)
    return [_tokens(layer.form, tokens, per_token, experts, device, generator) for _ in range(BATCHES)]


def _tokens(
    form: ExpertForm, tokens: int, per_token: int, experts: int, device: torch.device, generator: torch.Generator
) -> Tokens:
    ids = torch.rand(tokens, experts, device=device, generator=generator).topk(per_token).indices.int()
    shape = (tokens, form.hidden_size)
    if form.rows is torch.int8:
        rows = torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
        return Tokens(ids, rows, torch.full((tokens,), 1 / 73, device=device))
    return Tokens(ids, torch.randn(shape, device=device, generator=generator).to(form.rows), None)
