"""Reading the parts of a tensor, and numbers packed into int32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.tensor_source import TensorSlice, TensorSource

WEIGHT = ".weight"
FLOATS = ("F32", "BF16", "F16")


def sibling(name: str, part: str) -> str:
    """The part called ``part`` of the module whose matrix is called ``name``."""
    return f"{name.removesuffix(WEIGHT)}.{part}"


def find_part(
    source: TensorSource, name: str, dtypes: Sequence[str], shape: Sequence[int | None] | None = None
) -> TensorSlice:
    """The part ``name``, not read yet. Raises CheckpointError unless it has one of ``dtypes`` and is of ``shape``.

    None in a shape is any extent.
    """
    part = source.find(name)
    found = part.get_shape()
    if part.get_dtype() not in dtypes:
        raise CheckpointError(f"{source.place(name)}: expected {' or '.join(dtypes)}, found {part.get_dtype()}")
    if shape is not None and (
        len(shape) != len(found) or any(s is not None and s != f for s, f in zip(shape, found, strict=True))
    ):
        expected = [each if each is not None else "any" for each in shape]
        raise CheckpointError(f"{source.place(name)}: expected shape {expected}, found {found}")
    return part


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> int32 [..., n * 32 / bits]: unsigned numbers of ``bits``, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return numbers.flatten(-2)


def check_groups(place: str, groups: Tensor, inputs: int, count: int) -> Tensor:
    """``groups`` [K], the group of each input, once all are seen to be of ``count``. Raises CheckpointError."""
    if inputs and (int(groups.min()) < 0 or int(groups.max()) >= count):
        raise CheckpointError(f"{place}: expected groups from 0 to {count - 1}, found others; download it again")
    return groups.long()
