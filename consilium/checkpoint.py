"""A model's tensors, read lazily by name and checked: from safetensors files or made by a shape, in float or in int8.

Files are mapped into memory, so reading a tensor reads its own bytes and no others; that also holds for one expert
out of a tensor that fuses all experts of a layer. Tensors are views of the mapped file: processes share its pages.
A shape (consilium.shapes) makes a tensor when it is asked for, and other formats (consilium.formats) are decoded then.
Letters: D hidden size, E experts, F expert FFN size, N output channels, K what is summed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from consilium.compressed_tensors import hash_key, scale_name
from consilium.content_hash import HASH_BYTES
from consilium.errors import CheckpointError
from consilium.families import ExpertLayout
from consilium.formats.source import DecodedTensors
from consilium.matrix import Stored, to_floats
from consilium.model_config import ClampedSwiGLU
from consilium.model_folder import ModelFolder, read_model_folder
from consilium.quantization import MAX_SUMMED, Quantized
from consilium.shapes.folder import ShapeFolder
from consilium.shapes.tensors import RandomTensors
from consilium.tensor_files import TensorFiles
from consilium.tensor_source import TensorSlice, TensorSource

FLOAT_KINDS = ("F32", "BF16", "F16", "F64")


class ExpertBiases(NamedTuple):
    """What is added to the three products of an expert, in the checkpoint's own dtype."""

    gate: Tensor  # [F]
    up: Tensor  # [F]
    down: Tensor  # [D]


class ExpertTensors(NamedTuple):
    """The three matrices of one FFN, as the checkpoint holds them, and what else it computes with."""

    gate: Stored  # [F, D]
    up: Stored  # [F, D]
    down: Stored  # [D, F]
    biases: ExpertBiases | None = None
    activation: ClampedSwiGLU | None = None  # None is SiLU

    @property
    def matrices(self) -> tuple[Stored, Stored, Stored]:
        return self.gate, self.up, self.down

    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same three where they are floats. Raises CheckpointError where they are int8 on disk."""
        gate, up, down = self.matrices
        if isinstance(gate, Quantized) or isinstance(up, Quantized) or isinstance(down, Quantized):
            raise CheckpointError(
                "these weights are int8 on disk, and `none` computes in floats; use quantization int8 or "
                "int8-weight-only, or the float checkpoint they were made from"
            )
        return to_floats(gate), to_floats(up), to_floats(down)


class Checkpoint:
    """The tensors of one model. Not to be shared between threads.

    Tensors may be views of the mapped file: copy what must outlive a change of the file on disk.
    """

    def __init__(self, folder: Path | ShapeFolder) -> None:
        """Read the model's config and the names of its tensors. Raises CheckpointError that names the file."""
        model = read_model_folder(folder)
        self.folder = folder
        self.raw = model.raw
        self.config = model.config
        self.names = model.family.names
        self.scheme, self.int8, self.int4_group = model.scheme, model.int8, model.int4_group
        self.fingerprint = model.fingerprint
        self._source = _source(folder, model)

    def __contains__(self, name: str) -> bool:
        return self.spelling(name) in self._source

    def stored_names(self) -> Iterator[str]:
        """The name of every tensor of a folder, as it is on disk."""
        if not isinstance(self._source, TensorFiles):
            raise CheckpointError(f"{self.folder} holds no floats as they are; give a float checkpoint")
        return iter(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape on disk. Raises CheckpointError when the tensor or its file is missing or damaged."""
        return tuple(self._find(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole tensor in its dtype on disk.

        Raises CheckpointError when it is not a tensor of ``shape`` that holds finite floats.
        """
        return self._finite(name, self._checked(name, shape)[:])

    def matrix(self, name: str, shape: tuple[int, int]) -> Tensor | Quantized:
        """A weight matrix [N, K]: as ``tensor``, or int8 with its scales where the checkpoint holds it so.

        Raises CheckpointError when it is neither, or when the scales do not fit it.
        """
        if not self.int8 or self._find(name).get_dtype() in FLOAT_KINDS:
            return self.tensor(name, shape)
        if shape[1] > MAX_SUMMED:
            raise CheckpointError(
                f"{self._place(name)}: rows of {shape[1]} are too long for int8 (at most {MAX_SUMMED})"
            )
        values: Tensor = self._checked(name, shape, ("I8",))[:]
        # Copied: in the file they may lie at an address that no float32 has.
        scales = self.tensor(scale_name(name), (shape[0], 1)).to(torch.float32, copy=True).view(-1)  # [N]
        if (scales < 0).any():
            row = int((scales < 0).nonzero()[0])
            raise CheckpointError(
                f"{self._place(scale_name(name))}: expected scales of 0 and more, found {scales[row]:g} in row {row}"
            )
        return Quantized(values, scales)

    def expert(self, layer: int, expert: int) -> ExpertTensors:
        """One expert of a layer that routes; of fused tensors only this expert's part is read."""
        layout = self.layout(layer, expert)
        size, hidden = self.config.expert_size, self.config.hidden_size
        if not layout.fused:
            return self._separate(layout, layer, expert, size, self._expert_matrix)

        def read(template: str, *shape: int) -> Tensor:
            name = template.format(layer=layer)
            return self._finite(name, self._checked(name, (self.config.num_experts, *shape))[expert], expert)

        if not layout.transposed:
            gate_up, down = read(layout.gate_up, 2 * size, hidden), read(layout.down, hidden, size)
            return ExpertTensors(gate_up[:size], gate_up[size:], down)
        gate_up, down = read(layout.gate_up, hidden, 2 * size), read(layout.down, size, hidden)
        biases = None
        if self.config.expert_bias:
            both = read(layout.gate_up_bias, 2 * size)
            biases = ExpertBiases(both[::2], both[1::2], read(layout.down_bias, hidden))
        gate, up, down = (matrix.T.contiguous() for matrix in (gate_up[:, ::2], gate_up[:, 1::2], down))
        return ExpertTensors(gate, up, down, biases, self.config.activation)

    def stored_hash(self, layer: int, expert: int, *, int4: bool = False) -> bytes | None:
        """The content hash of an int8 or int4 expert, where `consilium quantize` has noted it beside its tensors."""
        layout = self.layout(layer, expert)
        if self.scheme is None or layout.fused:
            return None
        metadata = self._source.metadata(self.spelling(layout.down.format(layer=layer, expert=expert)))
        noted = metadata.get(hash_key(layer, expert, int4=int4), "")
        return bytes.fromhex(noted) if re.fullmatch(f"[0-9a-f]{{{2 * HASH_BYTES}}}", noted) else None

    def locate(self, tensor: Tensor) -> tuple[Path, int] | None:
        """The file that a tensor read here is a view of, and its first byte there; None for one in memory."""
        return self._source.locate(tensor) if isinstance(self._source, TensorFiles) else None

    def release(self) -> None:
        """Unmap files until they are read again: pages that were read count as this process's memory."""
        if isinstance(self._source, TensorFiles):
            self._source.release()

    def dense(self, layer: int) -> ExpertTensors:
        """The FFN of a layer that does not route. Raises CheckpointError when the family has none."""
        if self.names.dense is None or self.config.moe_layers[layer]:
            raise CheckpointError(f"{self.folder}: layer {layer} of a {self.config.family} model has no dense FFN")
        return self._separate(self.names.dense, layer, 0, self.config.dense_size, self.matrix)

    def shared(self, layer: int) -> ExpertTensors:
        """The shared experts of a layer that routes, as one FFN. Raises CheckpointError when the family has none."""
        if self.names.shared is None or not self.config.moe_layers[layer]:
            raise CheckpointError(f"{self.folder}: layer {layer} of a {self.config.family} model has no shared experts")
        return self._separate(self.names.shared, layer, 0, self.config.shared_size, self.matrix)

    def _separate(
        self,
        layout: ExpertLayout,
        layer: int,
        expert: int,
        size: int,
        read: Callable[[str, tuple[int, int]], Stored],
    ) -> ExpertTensors:
        hidden = self.config.hidden_size
        return ExpertTensors(
            read(layout.gate.format(layer=layer, expert=expert), (size, hidden)),
            read(layout.up.format(layer=layer, expert=expert), (size, hidden)),
            read(layout.down.format(layer=layer, expert=expert), (hidden, size)),
        )

    def _expert_matrix(self, name: str, shape: tuple[int, int]) -> Stored:
        """As ``matrix``, or int4 where the checkpoint holds what int4 experts take as it is."""
        found = self._source.int4(self.spelling(name)) if isinstance(self._source, DecodedTensors) else None
        if found is None:
            return self.matrix(name, shape)
        self._checked(name, shape)
        self._finite(name, found.scales)
        return found

    def layout(self, layer: int, expert: int) -> ExpertLayout:
        """The first known layout whose down projection is in the checkpoint."""
        for layout in self.names.experts:
            if layout.down.format(layer=layer, expert=expert) in self:
                return layout
        tried = ", ".join(layout.down.format(layer=layer, expert=expert) for layout in self.names.experts)
        raise CheckpointError(f"{self.folder}: expert {expert} of layer {layer} is missing; looked for {tried}")

    def _checked(self, name: str, shape: tuple[int, ...], kinds: Sequence[str] = FLOAT_KINDS) -> TensorSlice:
        part = self._find(name)
        if tuple(part.get_shape()) != shape:
            raise CheckpointError(
                f"{self._place(name)}: expected shape {list(shape)}, found {part.get_shape()}; does config.json belong "
                "to these weights?"
            )
        if part.get_dtype() not in kinds:
            raise CheckpointError(f"{self._place(name)}: expected one of {', '.join(kinds)}, found {part.get_dtype()}")
        return part

    def _finite(self, name: str, part: Tensor, *leading: int) -> Tensor:
        """``part`` of tensor ``name`` (at index ``leading``), once it is seen to hold no NaN and no infinity."""
        if part.numel() == 0 or torch.stack(torch.aminmax(part)).isfinite().all():  # NaN comes through a minimum
            return part
        bad = part.isfinite().logical_not_().nonzero()  # [count, dimensions]
        index = [*leading, *bad[0].tolist()]
        raise CheckpointError(
            f"{self._place(name)}: expected finite numbers, found {part[tuple(bad[0])].item()} at {index} and "
            f"{len(bad)} such in all; download the checkpoint again"
        )

    def _place(self, name: str) -> str:
        return self._source.place(self.spelling(name))

    def _find(self, name: str) -> TensorSlice:
        return self._source.find(self.spelling(name))

    def spelling(self, name: str) -> str:
        """The name under which the tensor is stored: the family's own, or the other one some writers use."""
        other = name if self.names.other_spelling is None else name.replace(*self.names.other_spelling)
        return other if name not in self._source and other in self._source else name


def _source(folder: Path | ShapeFolder, model: ModelFolder) -> TensorSource:
    if isinstance(folder, ShapeFolder):
        return RandomTensors(folder.recipe, model.config, model.family.names)
    files = TensorFiles(folder)
    if model.scheme is None or (model.int8 and model.scheme.experts is None):
        return files
    return DecodedTensors(files, model.scheme.experts or model.scheme)
