"""A Hugging Face folder, read lazily by tensor name: safetensors only, sharded or single.

Files are mapped into memory, so reading a tensor reads its own bytes and no others; that also holds for one expert
out of a tensor that fuses all experts of a layer. Letters: D hidden size, E experts, F expert FFN size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.families import ExpertLayout
from consilium.model_folder import read_json, read_model_folder

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOAT_KINDS = ("F32", "BF16", "F16", "F64")


class ExpertTensors(NamedTuple):
    """The three matrices of one FFN, in the checkpoint's own dtype."""

    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class Checkpoint:
    """The tensors of one model folder. Not to be shared between threads.

    Tensors may be views of the mapped file: copy what must outlive a change of the file on disk.
    """

    def __init__(self, folder: Path) -> None:
        """Read the folder's config and the names of its tensors. Raises CheckpointError that names the file."""
        model = read_model_folder(folder)
        self.folder = folder
        self.raw = model.raw
        self.config = model.config
        self.names = model.family.names
        self.fingerprint = model.fingerprint
        self._open_files: dict[str, Any] = {}
        self._file_of = self._read_index()

    def __contains__(self, name: str) -> bool:
        return self._spelling(name) in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape on disk. Raises CheckpointError when the tensor or its file is missing or damaged."""
        return tuple(self._slice(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole tensor in its dtype on disk. Raises CheckpointError when it is not a float tensor of ``shape``."""
        whole: Tensor = self._checked(name, shape)[:]
        return whole

    def expert(self, layer: int, expert: int) -> ExpertTensors:
        """One expert of a layer that routes; of fused tensors only this expert's part is read."""
        layout = self._layout(layer, expert)
        config = self.config
        if not layout.fused:
            return self._separate(layout, layer, expert, config.expert_size)
        experts, size, hidden = config.num_experts, config.expert_size, config.hidden_size
        fused = self._checked(layout.gate_up.format(layer=layer), (experts, 2 * size, hidden))  # [E, 2F, D]
        down = self._checked(layout.down.format(layer=layer), (experts, hidden, size))  # [E, D, F]
        gate_up = fused[expert]  # [2F, D]
        return ExpertTensors(gate_up[:size], gate_up[size:], down[expert])

    def dense(self, layer: int) -> ExpertTensors:
        """The FFN of a layer that does not route. Raises CheckpointError when the family has none."""
        if self.names.dense is None or self.config.moe_layers[layer]:
            raise CheckpointError(f"{self.folder}: layer {layer} of a {self.config.family} model has no dense FFN")
        return self._separate(self.names.dense, layer, 0, self.config.dense_size)

    def _separate(self, layout: ExpertLayout, layer: int, expert: int, size: int) -> ExpertTensors:
        hidden = self.config.hidden_size
        return ExpertTensors(
            self.tensor(layout.gate.format(layer=layer, expert=expert), (size, hidden)),
            self.tensor(layout.up.format(layer=layer, expert=expert), (size, hidden)),
            self.tensor(layout.down.format(layer=layer, expert=expert), (hidden, size)),
        )

    def _layout(self, layer: int, expert: int) -> ExpertLayout:
        """The first known layout whose down projection is in the checkpoint."""
        for layout in self.names.experts:
            if layout.down.format(layer=layer, expert=expert) in self:
                return layout
        tried = ", ".join(layout.down.format(layer=layer, expert=expert) for layout in self.names.experts)
        raise CheckpointError(f"{self.folder}: expert {expert} of layer {layer} is missing; looked for {tried}")

    def _checked(self, name: str, shape: tuple[int, ...]) -> Any:
        part = self._slice(name)
        place = f"{self.folder / self._file_of[self._spelling(name)]}: tensor {name}"
        if tuple(part.get_shape()) != shape:
            raise CheckpointError(f"{place}: expected shape {list(shape)}, found {part.get_shape()}")
        if part.get_dtype() not in FLOAT_KINDS:
            raise CheckpointError(f"{place}: expected one of {', '.join(FLOAT_KINDS)}, found {part.get_dtype()}")
        return part

    def _slice(self, name: str) -> Any:
        """A handle on the tensor that reads nothing yet."""
        spelling = self._spelling(name)
        file = self._file_of.get(spelling)
        if file is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; is the download complete?")
        try:
            return self._open(file).get_slice(spelling)
        except SafetensorError:
            raise CheckpointError(
                f"{self.folder / file}: tensor {name} is missing although {INDEX_FILE} places it there"
            ) from None

    def _spelling(self, name: str) -> str:
        """The name under which the tensor is stored: the family's own, or the other one some writers use."""
        if name not in self._file_of and self.names.other_spelling is not None:
            return name.replace(*self.names.other_spelling)
        return name

    def _open(self, file: str) -> Any:
        """The mapped ``file``, opened at first use: a folder may lack the shards nobody here reads."""
        if file not in self._open_files:
            path = self.folder / file
            try:
                self._open_files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing; is the download complete?") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}); download it again") from None
        return self._open_files[file]

    def _read_index(self) -> Mapping[str, str]:
        """The file that holds each tensor."""
        if (self.folder / INDEX_FILE).is_file():
            return _check_index(self.folder / INDEX_FILE, read_json(self.folder / INDEX_FILE).get("weight_map"))
        if (self.folder / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in self.folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds its weights only as pickle ({pickles[0]}), which can run code when read and is "
                f"refused; convert it to safetensors, or use the model's revision with {SINGLE_FILE}"
            )
        raise CheckpointError(f"{self.folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _check_index(file: Path, weight_map: object) -> Mapping[str, str]:
    """The index's mapping, once it is seen to name only safetensors files of its own folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map must map tensor names to files")
    for shard in set(map(str, weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map names {shard!r}, which is no .safetensors file of this folder")
    return {name: str(shard) for name, shard in weight_map.items()}
