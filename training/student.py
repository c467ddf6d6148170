"""The student: the teacher's weights, neurons shared out among experts, gates, and low-rank adapters that learn.

The experts' neurons lie one expert behind the other; ``spread`` [E, F] says which expert each belongs to, so that
experts may be of any size while they grow. An expert that is not chosen is multiplied by 0: that computes all of
them, but needs no kernels of its own, and training is short.
Letters: B blocks, L tokens of a block, D hidden size, F neurons of all experts, E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.default_model.conversion import DenseShape
from training.fake_int8 import fake_int8
from training.gates import Gated, GateOptions, gate
from training.llama import Dense, Matrices, Norms, attend, neurons, rms_norm, rope_tables
from training.split import Split

# ΔW = (SCALE / r)·B·A (Hu et al. 2021): the best learning rate then does not depend on the rank.
SCALE = 32.0


class Adapter(NamedTuple):
    """A low-rank change of a matrix [out, in]."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]

    def change(self) -> Tensor:
        """[out, in]."""
        return (SCALE / len(self.a)) * (self.b @ self.a)


class Router(NamedTuple):
    """The gate of a layer."""

    weight: Tensor  # [E, D], or [E / 2, D] where experts are paired
    bias: Tensor  # [E] of the choice; moves without gradients, all 0 in the end
    spread: Tensor  # [E, F] 1 where the neuron is the expert's
    paired: bool  # experts 2i and 2i + 1 have opposite logits, so the best E / 2 are one of each pair

    def rows(self) -> Tensor:
        """The gate's matrix as it is served, [E, D]."""
        return torch.stack((self.weight, -self.weight), dim=1).flatten(0, 1) if self.paired else self.weight


class StudentLayer(NamedTuple):
    """One layer; without a router it is dense."""

    norms: Norms
    base: Matrices
    adapters: tuple[Adapter, ...]  # in the order of Matrices
    router: Router | None

    def merged(self, dtype: torch.dtype) -> Matrices:
        """The matrices with their adapters."""
        pairs = zip(self.base, self.adapters, strict=True)
        return Matrices(*((base + adapter.change()).to(dtype) for base, adapter in pairs))


class Student:
    """All layers, and the parts of them that learn."""

    def __init__(self, shape: DenseShape, embed: Tensor, layers: list[StudentLayer], final_norm: Tensor) -> None:
        self.shape, self.embed, self.layers, self.final_norm = shape, embed, layers, final_norm

    def replaced(self, layers: list[StudentLayer]) -> Student:
        """The same model with other layers."""
        return Student(self.shape, self.embed, layers, self.final_norm)

    def parameters(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        found = {"final_norm": self.final_norm}
        for number, layer in enumerate(self.layers):
            found |= {f"{number}.{name}_norm": norm for name, norm in layer.norms._asdict().items()}
            for name, adapter in zip(Matrices._fields, layer.adapters, strict=True):
                found |= {f"{number}.{name}.a": adapter.a, f"{number}.{name}.b": adapter.b}
            if layer.router is not None:
                found[f"{number}.router"] = layer.router.weight
        return found


def make_student(
    teacher: Dense, ranks: Sequence[int], splits: Sequence[Split] | None, *, paired: bool = True, seed: int = 0
) -> Student:
    """A student that has learned nothing yet: its adapters are 0.

    ``teacher`` in float32; ``ranks`` in the order of Matrices. Without ``splits`` (one a layer) it stays dense. Pairs
    that stay ``paired`` learn faster: no slice of the FFN is ever left out or counted twice.
    """
    device = teacher.embed.device
    generator = torch.Generator().manual_seed(seed)

    def adapter(base: Tensor, rank: int) -> Adapter:
        out, size = base.shape
        a = (torch.rand(rank, size, generator=generator) * 2 - 1) / size**0.5
        return Adapter(a.to(device).requires_grad_(), torch.zeros(out, rank, device=device).requires_grad_())

    layers = []
    for number, (norms, base) in enumerate(teacher.layers):
        router = None
        if splits is not None:
            base, router = gathered(base, splits[number].neurons), _router(splits[number], paired)
        adapters = tuple(adapter(matrix, rank) for matrix, rank in zip(base, ranks, strict=True))
        layers.append(StudentLayer(Norms(*map(_learning, norms)), base, adapters, router))
    return Student(teacher.shape, teacher.embed, layers, _learning(teacher.final_norm))


def gathered(base: Matrices, neurons: Tensor) -> Matrices:
    """The same layer with the neurons [E, S] of its experts, one expert behind the other."""
    flat = neurons.flatten()
    return base._replace(gate=base.gate[flat], up=base.up[flat], down=base.down[:, flat].contiguous())


def membership(experts: int, size: int, device: torch.device) -> Tensor:
    """The ``spread`` of experts of one size: [E, F]."""
    return torch.eye(experts, device=device).repeat_interleave(size, dim=1)


def _router(split: Split, paired: bool) -> Router:
    experts, size = split.neurons.shape
    device = split.router.device
    weight = _learning(split.router[::2] if paired else split.router)
    return Router(weight, torch.zeros(experts, device=device), membership(experts, size, device), paired)


def _learning(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def student_layer(
    x: Tensor,
    layer: StudentLayer,
    rope: tuple[Tensor, Tensor],
    hard: Tensor,
    head_dim: int,
    eps: float,
    options: GateOptions,
    int8: bool = False,
) -> tuple[Tensor, Gated | None]:
    """One layer: [B, L, D] -> [B, L, D]. At ``hard`` (a scalar) 0 all experts are on, at 1 only those chosen."""
    w = layer.merged(x.dtype)
    x = x + attend(rms_norm(x, layer.norms.attention, eps), w, rope, head_dim)
    normed = rms_norm(x, layer.norms.ffn, eps)
    if layer.router is None:
        return x + nn.linear(neurons(normed, w), w.down), None
    router = layer.router
    gated = gate(nn.linear(normed.flatten(0, 1).float(), router.rows()), router.bias, options)
    mix = (1 - hard + hard * gated.mix).to(x.dtype)  # [B * L, E]
    compute = int8_experts if int8 else experts
    return x + compute(normed.flatten(0, 1), mix, w, router.spread.to(x.dtype)).view(x.shape), gated


def experts(x: Tensor, mix: Tensor, w: Matrices, spread: Tensor) -> Tensor:
    """Normed rows [T, D] -> [T, D], each expert weighed by ``mix`` [T, E]."""
    return nn.linear(neurons(x, w) * nn.linear(mix, spread.T), w.down)


def int8_experts(x: Tensor, mix: Tensor, w: Matrices, spread: Tensor) -> Tensor:
    """The same with what the workers round: rows, weights, and each expert's neurons with a scale of their own."""
    matrices, count = w._replace(gate=fake_int8(w.gate), up=fake_int8(w.up)), len(spread)
    hidden = fake_int8(neurons(fake_int8(x), matrices).view(len(x), count, -1))  # [T, E, F / E]
    down = fake_int8(w.down.view(len(w.down), count, -1))  # [D, E, F / E]
    return nn.linear((hidden * mix[:, :, None]).flatten(1), down.flatten(1))


Compute = Callable[..., tuple[Tensor, Gated | None]]


def student_states(
    student: Student,
    tokens: Tensor,
    hard: Tensor,
    options: GateOptions,
    dtype: torch.dtype,
    compute: Compute = student_layer,
    int8: bool = False,
) -> tuple[Tensor, list[Gated]]:
    """The normed hidden states [B, L, D] in front of the head for tokens [B, L], and what each gate did."""
    shape = student.shape
    x, gates = student.embed[tokens].to(dtype), []
    if torch.is_grad_enabled():
        x.requires_grad_()  # else the first layer would be compiled apart from the others
    rope = rope_tables(shape, tokens.shape[1], x.device, dtype)
    for layer in student.layers:
        x, gated = compute(x, layer, rope, hard, shape.head_dim, shape.rms_norm_eps, options, int8)
        if gated is not None:
            gates.append(gated)
    return rms_norm(x, student.final_norm, shape.rms_norm_eps), gates
