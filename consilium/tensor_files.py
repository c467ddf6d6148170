"""The safetensors files of a model folder, sharded or single, mapped into memory at first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from consilium.errors import CheckpointError
from consilium.model_folder import read_json
from consilium.tensor_header import read_header
from consilium.tensor_index import INDEX_FILE, SINGLE_FILE, check_index
from consilium.tensor_source import TensorSlice

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class TensorFiles:
    """The tensors of one folder by name. Not to be shared between threads.

    Raises CheckpointError that names the file when there are none, or when the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_files: dict[str, Any] = {}
        self._mapped: dict[str, range] = {}  # addresses of open files, as far as `locate` has asked for them
        self._file_of = self._read_index()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def find(self, name: str) -> TensorSlice:
        """A handle on the tensor that reads nothing yet. Raises CheckpointError when it is missing or damaged."""
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; is the download complete?")
        try:
            found: TensorSlice = self._open(file).get_slice(name)
        except SafetensorError:
            raise CheckpointError(
                f"{self._folder / file}: tensor {name} is missing although {INDEX_FILE} places it there"
            ) from None
        return found

    def metadata(self, name: str) -> Mapping[str, str]:
        """The metadata of the file that holds the tensor."""
        return self._open(self._file_of[name]).metadata() or {}

    def place(self, name: str) -> str:
        """The file and the tensor."""
        return f"{self._folder / self._file_of[name]}: tensor {name}"

    def locate(self, tensor: Tensor) -> tuple[Path, int] | None:
        """The file that ``tensor``, which was found here, is a view of, and its first byte there; None for a copy."""
        for file in self._open_files:
            mapped = self._addresses(file)
            if tensor.data_ptr() in mapped:
                return self._folder / file, tensor.data_ptr() - mapped.start
        return None

    def release(self) -> None:
        """Unmap what no tensor is a view of any more; files are opened again when they are read again."""
        self._open_files.clear()
        self._mapped.clear()

    def _addresses(self, file: str) -> range:
        """Where an open file is mapped."""
        if file not in self._mapped:
            first = next((each for each in read_header(self._folder / file) if each.nbytes), None)
            if first is None:
                return range(0)
            start = self._open(file).get_tensor(first.name).data_ptr() - first.begin
            self._mapped[file] = range(start, start + (self._folder / file).stat().st_size)
        return self._mapped[file]

    def _open(self, file: str) -> Any:
        """The mapped ``file``, opened at first use: a folder may lack the shards nobody here reads."""
        if file not in self._open_files:
            path = self._folder / file
            try:
                self._open_files[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing; is the download complete?") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}); download it again") from None
        return self._open_files[file]

    def _read_index(self) -> Mapping[str, str]:
        """The file that holds each tensor."""
        folder = self._folder
        if (folder / INDEX_FILE).is_file():
            return check_index(folder / INDEX_FILE, read_json(folder / INDEX_FILE).get("weight_map"))
        if (folder / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds its weights only as pickle ({pickles[0]}), which can run code when read and is "
                f"refused; convert it to safetensors, or use the model's revision with {SINGLE_FILE}"
            )
        raise CheckpointError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
