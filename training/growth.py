"""Progressive growth: a student starts with few experts, and every layer's busiest one is split as training goes on.

The busiest expert's tokens are shared between it and a copy of it: both start with its neurons, and a random direction
moves their gates apart, so that each is better liked by one half of the tokens. (Copying experts is sparse upcycling,
Komatsuzaki et al. 2023.) Letters: E experts, F neurons of all experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.errors import ConfigError
from training.llama import Matrices
from training.student import Adapter, Router, Student, StudentLayer


def grow(student: Student, busiest: Sequence[int], generator: torch.Generator, apart: float = 0.25) -> Student:
    """The student with one expert more in every layer, for the expert of each layer that is split.

    ``apart`` is how far the two gates move, in lengths of the busiest expert's own.
    """
    pairs = zip(student.layers, busiest, strict=True)
    return student.replaced([_grown(layer, expert, generator, apart) for layer, expert in pairs])


def _grown(layer: StudentLayer, busiest: int, generator: torch.Generator, apart: float) -> StudentLayer:
    router = layer.router
    if router is None or router.paired:
        raise ConfigError("growth needs a gate whose experts are not paired")
    mine = router.spread[busiest].nonzero()[:, 0]  # the neurons that are copied
    order = torch.cat((torch.arange(router.spread.shape[1], device=mine.device), mine))
    row = router.weight.detach()[busiest]
    direction = torch.randn(len(row), generator=generator).to(row.device)
    direction *= apart * row.norm().clamp(min=1e-6) / direction.norm()
    weight = torch.cat((router.weight.detach(), (row - direction)[None]))
    weight[busiest] = row + direction
    spread = torch.cat((router.spread[:, order], router.spread.new_zeros(1, len(order))))
    spread[busiest, -len(mine) :], spread[-1, -len(mine) :] = 0, 1
    bias = torch.cat((router.bias, router.bias[busiest : busiest + 1]))
    grown = Router(weight.requires_grad_(), bias, spread, paired=False)
    base = layer.base._replace(
        gate=layer.base.gate[order], up=layer.base.up[order], down=layer.base.down[:, order].contiguous()
    )
    pairs = zip(Matrices._fields, layer.adapters, strict=True)
    return StudentLayer(layer.norms, base, tuple(_copied(name, adapter, order) for name, adapter in pairs), grown)


def _copied(name: str, adapter: Adapter, order: Tensor) -> Adapter:
    a, b = adapter.a.detach(), adapter.b.detach()
    if name in ("gate", "up"):
        b = b[order]
    elif name == "down":
        a = a[:, order]
    return Adapter(a.clone().requires_grad_(), b.clone().requires_grad_())
