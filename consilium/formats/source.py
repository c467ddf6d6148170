"""A quantized checkpoint's tensors under the names that float checkpoints give them, decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from consilium.formats.awq_gptq import Awq, Gptq
from consilium.formats.fp8 import Float8
from consilium.formats.mxfp4 import Mxfp4
from consilium.formats.packed import Packed
from consilium.formats.scheme import Scheme
from consilium.int4 import Int4Rows
from consilium.tensor_source import TensorSlice, TensorSource


class Format(Protocol):
    """One way to store a tensor in parts."""

    def main(self, name: str) -> str:
        """The part that is there wherever tensor ``name`` is stored so."""
        ...

    def holds(self, name: str) -> bool:
        """Whether tensor ``name`` is stored so."""
        ...

    def shape(self, name: str) -> list[int]:
        """That of the tensor, by its parts. Raises CheckpointError where they do not fit."""
        ...

    def decode(self, name: str, index: int | None) -> Tensor:
        """The tensor in float32, or its part at ``index``. Raises CheckpointError as ``shape`` does."""
        ...


class DecodedTensors:
    """A tensor source over another one."""

    def __init__(self, source: TensorSource, scheme: Scheme) -> None:
        self._source, self._format = source, _format(source, scheme)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._source or self._format.main(name) in self._source)

    def find(self, name: str) -> TensorSlice:
        """As TensorSource has it."""
        return DecodedTensor(self._format, name) if self._format.holds(name) else self._source.find(name)

    def int4(self, name: str) -> Int4Rows | None:
        """The matrix as it is stored, where int4 experts take it so. Raises CheckpointError."""
        form = self._format
        return form.int4(name) if isinstance(form, Packed | Gptq) and form.holds(name) else None

    def metadata(self, name: str) -> Mapping[str, str]:
        """Of the file that holds the tensor."""
        return self._source.metadata(self._stored(name))

    def place(self, name: str) -> str:
        """The file and the tensor, as it is called there."""
        return self._source.place(self._stored(name))

    def _stored(self, name: str) -> str:
        return name if name in self._source else self._format.main(name)


@dataclass(frozen=True, slots=True)
class DecodedTensor:
    """One tensor, not decoded yet."""

    form: Format
    name: str

    def get_shape(self) -> list[int]:
        return self.form.shape(self.name)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: slice | int) -> Tensor:
        # In memory as a float checkpoint has it: sums of floats are added in another order where it is transposed.
        if isinstance(index, int):
            return self.form.decode(self.name, index).contiguous()
        return self.form.decode(self.name, None)[index].contiguous()


def _format(source: TensorSource, scheme: Scheme) -> Format:
    if scheme.kind == "fp8":
        return Float8(source, scheme.scale, scheme.block)
    if scheme.kind == "mxfp4":
        return Mxfp4(source)
    if scheme.kind == "packed":
        return Packed(source, scheme.bits, scheme.int4_group)
    if scheme.kind == "awq":
        return Awq(source)
    return Gptq(source, scheme)
