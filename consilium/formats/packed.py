"""compressed-tensors "pack-quantized": integers of 4 or 8 bits, packed by input; weight = (q - zero) · scale.

Letters: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.formats.int4_groups import int4_rows
from consilium.formats.parts import FLOATS, check_groups, find_part, sibling, unpack
from consilium.int4 import Int4Rows
from consilium.tensor_source import TensorSource


class Packed:
    """Matrices [N, K] as X.weight_packed, X.weight_scale [N, G], X.weight_shape; zero points and an order, if any."""

    def __init__(self, source: TensorSource, bits: int, int4_group: int = 0) -> None:
        self._source, self._bits, self._per_word, self._int4_group = source, bits, 32 // bits, int4_group

    def main(self, name: str) -> str:
        return sibling(name, "weight_packed")

    def holds(self, name: str) -> bool:
        return self.main(name) in self._source

    def shape(self, name: str) -> list[int]:
        part = sibling(name, "weight_shape")
        rows, columns = find_part(self._source, part, ("I64", "I32"), (2,))[:].tolist()
        find_part(self._source, self.main(name), ("I32",), (rows, -(-columns // self._per_word)))
        return [rows, columns]

    def decode(self, name: str, index: int | None) -> Tensor:
        rows, columns = self.shape(name)
        scales = find_part(self._source, sibling(name, "weight_scale"), FLOATS, (rows, None))[:].float()  # [N, G]
        groups = self._groups(name, columns, scales.shape[1])  # [K]
        values = unpack(self._source.find(self.main(name))[:], self._bits)[:, :columns]
        values = values - self._zeros(name, rows, scales.shape[1])[:, groups]
        weight = values.float() * scales[:, groups]  # [N, K]
        return weight if index is None else weight[index]

    def int4(self, name: str) -> Int4Rows | None:
        """The matrix as int4 takes it, where it is stored so."""
        if not self._int4_group or sibling(name, "weight_zero_point") in self._source:
            return None
        (rows, columns), group = self.shape(name), self._int4_group
        scales = find_part(self._source, sibling(name, "weight_scale"), FLOATS, (rows, None))[:].float()
        groups = self._groups(name, columns, scales.shape[1])
        return int4_rows(self._source.find(self.main(name))[:], scales, groups, group)

    def _groups(self, name: str, columns: int, count: int) -> Tensor:
        """The group of each input."""
        part = sibling(name, "weight_g_idx")
        if part in self._source:
            found = find_part(self._source, part, ("I32", "I64"), (columns,))[:]
            if not (found < 0).all():  # -1 everywhere: no order
                return check_groups(self._source.place(part), found, columns, count)
        group = self._int4_group
        if group and count == -(-columns // group):  # the last one may be shorter
            return torch.arange(columns) // group
        if count == 0 or columns % count:
            place = self._source.place(sibling(name, "weight_scale"))
            raise CheckpointError(f"{place}: {count} groups do not divide {columns} inputs evenly")
        return torch.arange(columns) // (columns // count)

    def _zeros(self, name: str, rows: int, count: int) -> Tensor:
        """Zero points [N, G], as the values are stored: half of the range above what they stand for."""
        part = sibling(name, "weight_zero_point")
        if part not in self._source:
            return torch.full((rows, count), 2 ** (self._bits - 1), dtype=torch.int32)
        stored = self._source.find(part)
        if stored.get_dtype() == "I8":
            signed = find_part(self._source, part, ("I8",), (rows, count))[:].int()
            return torch.add(signed, 2 ** (self._bits - 1))
        packed = find_part(self._source, part, ("I32",), (-(-rows // self._per_word), count))[:]
        zeros: Tensor = unpack(packed.T, self._bits).T[:rows]
        return zeros
