"""What a Llama-style decoder computes, as pure functions over whole blocks: the teacher's and the student's maths.

Letters: B blocks, L tokens of a block, D hidden size, H query heads, G key-value heads, d head size, F FFN size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nn
from torch import Tensor

from consilium.default_model.conversion import DenseShape


class Matrices(NamedTuple):
    """The seven matrices of a layer; the neurons' rows of ``gate`` and ``up`` are the columns of ``down``."""

    q: Tensor  # [H * d, D]
    k: Tensor  # [G * d, D]
    v: Tensor  # [G * d, D]
    o: Tensor  # [D, H * d]
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class Norms(NamedTuple):
    """The two RMSNorms of a layer."""

    attention: Tensor  # [D]
    ffn: Tensor  # [D]


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense model's weights."""

    shape: DenseShape
    embed: Tensor  # [V, D], the head too
    layers: list[tuple[Norms, Matrices]]
    final_norm: Tensor  # [D]


def rope_tables(shape: DenseShape, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, d] of the rotary embedding (Su et al. 2021), both halves alike."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    angles = torch.arange(length, dtype=torch.float64)[:, None] * shape.rope_theta ** -exponents[None, :]
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, heads, L, d] at their positions."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[…, D] -> […, D], in float32 between."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def attend(x: Tensor, w: Matrices, rope: tuple[Tensor, Tensor], head_dim: int) -> Tensor:
    """Causal attention over normed blocks [B, L, D] -> [B, L, D]."""
    blocks, length, _ = x.shape

    def heads(weight: Tensor) -> Tensor:
        return nn.linear(x, weight).view(blocks, length, -1, head_dim).transpose(1, 2)  # [B, heads, L, d]

    q, k, v = rotate(heads(w.q), *rope), rotate(heads(w.k), *rope), heads(w.v)
    out = nn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return nn.linear(out.transpose(1, 2).reshape(blocks, length, -1), w.o)


def neurons(x: Tensor, w: Matrices) -> Tensor:
    """What the F neurons of an FFN say to normed rows: […, D] -> […, F]."""
    return nn.silu(nn.linear(x, w.gate)) * nn.linear(x, w.up)


def dense_layer(x: Tensor, norms: Norms, w: Matrices, rope: tuple[Tensor, Tensor], head_dim: int, eps: float) -> Tensor:
    """One layer of the dense model: [B, L, D] -> [B, L, D]."""
    x = x + attend(rms_norm(x, norms.attention, eps), w, rope, head_dim)
    return x + nn.linear(neurons(rms_norm(x, norms.ffn, eps), w), w.down)


def hidden_states(model: Dense, tokens: Tensor, layer: object = None) -> Tensor:
    """The normed hidden states [B, L, D] in front of the head, for tokens [B, L].

    ``layer`` is a compiled ``dense_layer``.
    """
    compute = dense_layer if layer is None else layer
    assert callable(compute)
    shape = model.shape
    x = model.embed[tokens]
    rope = rope_tables(shape, tokens.shape[1], x.device, x.dtype)
    for norms, matrices in model.layers:
        x = compute(x, norms, matrices, rope, shape.head_dim, shape.rms_norm_eps)
    return rms_norm(x, model.final_norm, shape.rms_norm_eps)
