"""How far a run of `consilium quantize` has come, kept in the folder it writes, so that it can be taken up again.

Beside the shards lie `quantize.unfinished.json` (what is made from what, and every finished shard with its SHA-256) and
the hidden states of the calibration text behind the last finished layer. Both are gone once the folder is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from consilium.errors import ConfigError
from consilium.model_folder import UNFINISHED
from consilium.quantize.layer_tensors import Shard
from consilium.tensor_index import INDEX_FILE

_HIDDEN = "quantize.hidden-{done}.safetensors"


class Progress:
    """Shards finished so far, in order, and the hidden states [N, D] to go on from."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], shards: int) -> None:
        """Take up what is in ``folder`` where it was begun with the same ``settings``; else begin.

        Raises ConfigError where it was begun with others.
        """
        self._folder, self._settings, self._shards = folder, settings, shards
        self._finished: list[dict[str, Any]] = []  # of every shard: file, sha256, bytes and names
        self.hidden: Tensor | None = None
        if (folder / UNFINISHED).is_file():
            self._resume()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._note()

    @property
    def done(self) -> int:
        """How many shards are finished."""
        return len(self._finished)

    def add(self, shard: Shard, hidden: Tensor | None) -> None:
        """Write the next shard, and the hidden states that the one after it starts from."""
        file = self._file(self.done)
        metadata = {key: value.hex() for key, value in shard.hashes.items()}
        _write_tensors(self._folder / file, shard.tensors, {"format": "pt", **metadata})
        if hidden is not None:
            _write_tensors(self._hidden(self.done + 1), {"hidden": hidden}, {})
        self._finished.append(
            {
                "file": file,
                "sha256": _sha256(self._folder / file),
                "bytes": sum(tensor.nbytes for tensor in shard.tensors.values()),
                "names": list(shard.tensors),
            }
        )
        self._note()
        self._hidden(self.done - 1).unlink(missing_ok=True)

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write what makes the folder a model. From here on it is read."""
        weight_map = {name: shard["file"] for shard in self._finished for name in shard["names"]}
        size = sum(shard["bytes"] for shard in self._finished)
        _write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        _write_json(self._folder / "config.json", config)
        for left in self._folder.glob(_HIDDEN.format(done="*")):
            left.unlink()
        (self._folder / UNFINISHED).unlink()

    def _resume(self) -> None:
        """What was written before, if every byte of it is still there; else nothing of it."""
        stated = _read_json(self._folder / UNFINISHED)
        if stated.get("settings") != self._settings:
            raise ConfigError(
                f"{self._folder} holds an unfinished run of `consilium quantize` with another model, text or version; "
                "finish that one, or start over with --force"
            )
        finished = stated.get("shards", [])
        try:
            if any(_sha256(self._folder / shard["file"]) != shard["sha256"] for shard in finished):
                return
            if finished and self._settings["tokens"] is not None:
                self.hidden = load_file(self._hidden(len(finished)))["hidden"]
        except (OSError, SafetensorError):
            return
        self._finished = finished

    def _note(self) -> None:
        _write_json(self._folder / UNFINISHED, {"settings": self._settings, "shards": self._finished})

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{self._shards:05}.safetensors"

    def _hidden(self, done: int) -> Path:
        return self._folder / _HIDDEN.format(done=done)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """All of the file or nothing: it gets its name when it is complete."""
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    # safetensors makes its files readable by their owner alone; workers may run as another user.
    partial.chmod(0o644)
    partial.replace(file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(file)


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}
