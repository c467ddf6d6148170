"""Makes the small file that the repository keeps out of a student, and a student out of such a file.

Letters: D hidden size, E experts, S neurons of an expert, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilium.default_model.delta import MATRICES, MOST_BITS, Delta, LowRank
from training.llama import Dense, Matrices, Norms
from training.split import Split
from training.student import SCALE, Adapter, Router, Student, StudentLayer, gathered, membership

_LEVELS = 127


def make_delta(student: Student, splits: Sequence[Split], top_k: int) -> Delta:
    """The student in int8 and powers of two; its gates rounded to bfloat16. The teacher's own weights are left out."""
    routers = [layer.router for layer in student.layers]
    found = [router for router in routers if router is not None]
    changes = {}
    for place, name in enumerate(MATRICES):
        parts = [_rounded(layer.adapters[place]) for layer in student.layers]
        changes[name] = LowRank(*(np.stack(each) for each in zip(*parts, strict=True)))
    return Delta(
        top_k,
        np.stack([split.neurons.cpu().numpy().astype(np.uint16) for split in splits]),
        _stacked([router.rows().detach().bfloat16() for router in found]),
        _stacked([layer.norms.attention for layer in student.layers]),
        _stacked([layer.norms.ffn for layer in student.layers]),
        student.final_norm.detach().float().cpu().numpy(),
        changes,
    )


def merged_student(delta: Delta, teacher: Dense) -> Student:
    """What the file makes of the teacher (float32), for measuring: nothing of it learns."""
    device = teacher.embed.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    layers = []
    for number, (_, base) in enumerate(teacher.layers):
        named = zip(MATRICES, gathered(base, tensor(delta.neurons[number].astype(np.int64))), strict=True)
        matrices = [delta.changes[name].apply(number, matrix.cpu().numpy()) for name, matrix in named]
        experts, size = delta.neurons[number].shape
        spread = membership(experts, size, device)
        router = Router(tensor(delta.routers[number]), torch.zeros(experts, device=device), spread, paired=False)
        norms = Norms(tensor(delta.attention_norms[number]), tensor(delta.ffn_norms[number]))
        merged = Matrices(*map(tensor, matrices))
        none = tuple(Adapter(m.new_zeros(1, m.shape[1]), m.new_zeros(len(m), 1)) for m in merged)
        layers.append(StudentLayer(norms, merged, none, router))
    return Student(teacher.shape, teacher.embed, layers, tensor(delta.final_norm))


def _rounded(adapter: Adapter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows a [r, in], columns b [out, r] and exponents [r] of an adapter whose components stand at right angles."""
    a, b = _balanced(adapter)
    a_exponents, b_exponents = _exponents(a.abs().amax(1)), _exponents(b.abs().amax(0))
    exponents = a_exponents + b_exponents
    b_exponents += (exponents.max() - MOST_BITS - exponents).clamp(min=0)  # what is that small becomes coarser
    rows = torch.ldexp(a, -a_exponents[:, None]).round().clamp(-_LEVELS, _LEVELS)
    columns = torch.ldexp(b, -b_exponents[None, :]).round().clamp(-_LEVELS, _LEVELS)
    parts = rows, columns, a_exponents + b_exponents
    return tuple(part.to(torch.int8).cpu().numpy() for part in parts)  # type: ignore[return-value]  # three of them


def _exponents(largest: Tensor) -> Tensor:
    """The least powers of two that bring magnitudes to at most 127."""
    return torch.ceil(torch.log2(largest.clamp(min=2.0**-40) / _LEVELS)).to(torch.int32)


def _balanced(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The same product as its singular vectors, each pair of one length: [r, in] and [out, r] in float64."""
    q_b, r_b = torch.linalg.qr(adapter.b.detach().double())  # [out, r], [r, r]
    q_a, r_a = torch.linalg.qr(adapter.a.detach().double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = (s * SCALE / len(adapter.a)).sqrt()
    return (q_a @ v.T * root).T, q_b @ u * root


def _stacked(tensors: list[Tensor]) -> np.ndarray:
    return torch.stack([each.detach().float().cpu() for each in tensors]).numpy()
