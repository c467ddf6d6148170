"""A shape's tensors, each made from its own name when it is asked for: int8 matrices with scales, the rest bfloat16.

A tensor's bytes are those of a generator of its own, seeded by a hash of shape, seed and name, so it is the same
whoever makes it, whatever was made before. (PCG64DXSM: four times as fast as Philox, and numpy keeps its stream for
good.) Values are the odd numbers from -127 to 127, all equally likely. Scales keep what goes into a product as large as
what comes out, so that hidden states stay finite through any number of layers.
Letters: N output channels, K what is summed over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilium.compressed_tensors import scale_name
from consilium.errors import CheckpointError
from consilium.families import ExpertLayout, Names
from consilium.model_config import ModelConfig
from consilium.shapes.folder import PREFIX, Recipe

# The root mean square of the values.
VALUES_RMS = math.sqrt((128**2 - 1) / 3)
# How much larger than its input a head's output is: logits of a spread that sampling can tell apart.
HEAD_GAIN = 4.0
# The same for the gate: the first of the experts that a token asks counts a few times as much as the last.
ROUTER_GAIN = 2.0


class Spec(NamedTuple):
    """What a tensor is to be; ``gain``: how much larger a product's output is than its input."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # I8 (a matrix with scales), F32 (the scales of one) or BF16
    gain: float = 1.0
    summed: int = 1  # K of the matrix, also where this is its scales


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """One tensor, not made yet."""

    spec: Spec
    recipe: Recipe

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)

    def get_dtype(self) -> str:
        return self.spec.dtype

    def __getitem__(self, index: slice | int) -> Tensor:
        return self._make()[index]

    def _make(self) -> Tensor:
        name, shape, dtype, gain, summed = self.spec
        values = torch.from_numpy(random_values(self.recipe, name, shape))
        if dtype == "I8":
            return values
        scale = gain / (VALUES_RMS * math.sqrt(summed))
        if dtype == "F32":  # the scales: from 0.5 to 1.5 times the one that has this gain, rounded once
            return (1 + values.float() / 256).mul_(torch.tensor(scale, dtype=torch.float32))
        floats = values.to(torch.bfloat16)
        if len(shape) == 1:  # a norm: from 0.5 to 1.5
            return floats.mul_(2**-8).add_(1)
        return floats.mul_(2.0 ** round(math.log2(scale)))  # exact: a power of two


class RandomTensors:
    """The tensors of a shape by name, of which none is kept."""

    def __init__(self, recipe: Recipe, config: ModelConfig, names: Names) -> None:
        self._recipe = recipe
        self._specs = {spec.name: spec for spec in tensor_specs(config, names)}

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def find(self, name: str) -> RandomTensor:
        """The tensor called ``name``, not made yet. Raises CheckpointError when the shape has none."""
        if name not in self._specs:
            raise CheckpointError(f"{self.place(name)} is missing")
        return RandomTensor(self._specs[name], self._recipe)

    def metadata(self, name: str) -> Mapping[str, str]:  # noqa: ARG002 (TensorSource's)
        """Nothing: whoever needs a content hash computes it."""
        return {}

    def place(self, name: str) -> str:
        """The shape and the tensor."""
        return f"{PREFIX}{self._recipe.shape}: tensor {name}"


def random_values(recipe: Recipe, name: str, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Odd int8 numbers from -127 to 127."""
    digest = hashlib.sha256(f"{recipe.shape} {recipe.seed} {name}".encode()).digest()
    count = math.prod(shape)
    words = np.random.PCG64DXSM(int.from_bytes(digest, "little")).random_raw(-(-count // 8))
    words |= np.uint64(0x0101010101010101)  # odd, so that the mean is 0 and -128 does not occur
    return words.astype("<u8", copy=False).view(np.int8)[:count].reshape(shape)


def tensor_specs(config: ModelConfig, names: Names) -> Iterator[Spec]:
    """Every tensor, layer by layer; the head last."""
    hidden = config.hidden_size
    yield Spec(names.embed, (config.vocab_size, hidden), "BF16")
    for layer in range(config.num_layers):
        yield from _attention(config, names, layer)
        if config.moe_layers[layer]:
            yield Spec(names.router.format(layer=layer), (config.num_experts, hidden), "BF16", ROUTER_GAIN, hidden)
            for expert in range(config.num_experts):
                yield from _ffn(names.experts[0], layer, expert, config.expert_size, hidden)
        elif names.dense is not None:
            yield from _ffn(names.dense, layer, 0, config.dense_size, hidden)
    yield Spec(names.final_norm, (hidden,), "BF16")
    yield from _matrix(names.head, config.vocab_size, hidden, HEAD_GAIN)


def _attention(config: ModelConfig, names: Names, layer: int) -> Iterator[Spec]:
    hidden, inner, kv = config.hidden_size, *(n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    norms = {names.input_norm: hidden, names.post_norm: hidden}
    if config.qk_norm:
        norms |= {names.q_norm: config.head_dim, names.k_norm: config.head_dim}
    for name, size in norms.items():
        yield Spec(name.format(layer=layer), (size,), "BF16")
    for name, rows, columns in (
        (names.q_proj, inner, hidden),
        (names.k_proj, kv, hidden),
        (names.v_proj, kv, hidden),
        (names.o_proj, hidden, inner),
    ):
        yield from _matrix(name.format(layer=layer) + ".weight", rows, columns)


def _ffn(layout: ExpertLayout, layer: int, expert: int, size: int, hidden: int) -> Iterator[Spec]:
    for name, rows, columns in ((layout.gate, size, hidden), (layout.up, size, hidden), (layout.down, hidden, size)):
        yield from _matrix(name.format(layer=layer, expert=expert), rows, columns)


def _matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> Iterator[Spec]:
    """An int8 matrix and its scales."""
    yield Spec(name, (rows, columns), "I8")
    yield Spec(scale_name(name), (rows, 1), "F32", gain, columns)
