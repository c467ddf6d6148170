"""AWQ (Lin et al. 2023) and GPTQ (Frantar et al. 2022) as AutoAWQ and AutoGPTQ write them: weight = (q - zero) · scale.

Both hold the transpose of a matrix as X.qweight, with X.qzeros and X.scales [G, N] for groups of inputs.
Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.formats.int4_groups import HALF, int4_rows
from consilium.formats.parts import FLOATS, check_groups, find_part, sibling, unpack
from consilium.formats.scheme import Scheme
from consilium.int4 import Int4Rows
from consilium.tensor_source import TensorSource

# Where AWQ has each of eight neighbouring outputs in a word.
AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


class Awq:
    """qweight int32 [K, N / 8], packed by output; qzeros [G, N / 8] likewise."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def main(self, name: str) -> str:
        return sibling(name, "qweight")

    def holds(self, name: str) -> bool:
        return self.main(name) in self._source

    def shape(self, name: str) -> list[int]:
        inputs, words = find_part(self._source, self.main(name), ("I32",), (None, None)).get_shape()
        return [words * 8, inputs]

    def decode(self, name: str, index: int | None) -> Tensor:
        outputs, inputs = self.shape(name)
        scales = find_part(self._source, sibling(name, "scales"), FLOATS, (None, outputs))[:].float()  # [G, N]
        zeros = find_part(self._source, sibling(name, "qzeros"), ("I32",), (len(scales), outputs // 8))[:]
        values = _awq_unpack(self._source.find(self.main(name))[:])  # [K, N]
        groups = _even_groups(self._source, name, inputs, len(scales))
        weight = ((values - _awq_unpack(zeros)[groups]).float() * scales[groups]).T  # [N, K]
        return weight if index is None else weight[index]


class Gptq:
    """qweight int32 [K / 8, N], packed by input (by four of 8 bits); qzeros [G, N / 8], less ``zero_offset``.

    X.g_idx [K] names the group of each input (`desc_act`); without it they follow each other.
    """

    def __init__(self, source: TensorSource, scheme: Scheme) -> None:
        self._source, self._bits, self._per_word = source, scheme.bits, 32 // scheme.bits
        self._zero_offset, self._group_size = scheme.zero_offset, scheme.group_size
        self._int4_group = scheme.int4_group

    def main(self, name: str) -> str:
        return sibling(name, "qweight")

    def holds(self, name: str) -> bool:
        return self.main(name) in self._source

    def shape(self, name: str) -> list[int]:
        words, outputs = find_part(self._source, self.main(name), ("I32",), (None, None)).get_shape()
        return [outputs, words * self._per_word]

    def decode(self, name: str, index: int | None) -> Tensor:
        outputs, inputs = self.shape(name)
        scales, zeros = self._scales_and_zeros(name, outputs)
        values = unpack(self._source.find(self.main(name))[:].T, self._bits)  # [N, K]
        groups = self._groups(name, inputs, len(scales))
        weight = (values - zeros.T[:, groups]).float() * scales.T[:, groups]  # [N, K]
        return weight if index is None else weight[index]

    def int4(self, name: str) -> Int4Rows | None:
        """The matrix as int4 takes it, where it is stored so."""
        if not self._int4_group:
            return None
        (outputs, inputs), group = self.shape(name), self._int4_group
        scales, zeros = self._scales_and_zeros(name, outputs)
        if (zeros != HALF).any():
            return None
        groups = self._groups(name, inputs, len(scales))
        return int4_rows(self._source.find(self.main(name))[:].T, scales.T, groups, group)

    def _scales_and_zeros(self, name: str, outputs: int) -> tuple[Tensor, Tensor]:
        """[G, N] each."""
        scales = find_part(self._source, sibling(name, "scales"), FLOATS, (None, outputs))[:].float()
        shape = len(scales), -(-outputs // self._per_word)
        packed = find_part(self._source, sibling(name, "qzeros"), ("I32",), shape)[:]
        return scales, unpack(packed, self._bits)[:, :outputs] + self._zero_offset

    def _groups(self, name: str, inputs: int, count: int) -> Tensor:
        part = sibling(name, "g_idx")
        if part in self._source:
            found = find_part(self._source, part, ("I32", "I64"), (inputs,))[:]
            return check_groups(self._source.place(part), found, inputs, count)
        groups = torch.arange(inputs) // (self._group_size or inputs)
        return check_groups(self._source.place(sibling(name, "scales")), groups, inputs, count)


def _awq_unpack(packed: Tensor) -> Tensor:
    """int32 [n, N / 8] -> [n, N]."""
    numbers: Tensor = unpack(packed, 4).unflatten(-1, (-1, 8))[..., AWQ_PLACES]
    return numbers.flatten(-2)


def _even_groups(source: TensorSource, name: str, inputs: int, count: int) -> Tensor:
    """The group of each input, where all are of one size."""
    if count == 0 or inputs % count:
        place = source.place(sibling(name, "scales"))
        raise CheckpointError(f"{place}: {count} groups do not divide {inputs} inputs evenly")
    return torch.arange(inputs) // (inputs // count)
