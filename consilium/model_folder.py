"""What the JSON files of a Hugging Face folder say. Free of torch: the HTTP process reads them too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from consilium.errors import CheckpointError
from consilium.families import Family, find_family, parse_config
from consilium.formats.scheme import INT4_GROUP, Scheme, find_scheme
from consilium.model_config import ModelConfig
from consilium.shapes.folder import ShapeFile, ShapeFolder

# There while `consilium quantize` writes a folder, and after it was interrupted.
UNFINISHED = "quantize.unfinished.json"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """config.json as written (``raw``) and as understood, and the family it belongs to."""

    path: Path | ShapeFolder
    raw: dict[str, Any]
    config: ModelConfig
    family: Family
    scheme: Scheme | None  # how its matrices are stored; None: as floats
    fingerprint: str  # hex SHA-256 over the canonical form of config.json: equal for equal content, however written

    @property
    def int8(self) -> bool:
        """Whether its matrices are the int8 that we compute with (consilium.compressed_tensors)."""
        return self.scheme is not None and self.scheme.kind == "int8"

    @property
    def int4_group(self) -> int:
        """Inputs that share a scale where experts are computed in int4."""
        scheme = self.scheme and (self.scheme.experts or self.scheme)
        return (scheme.int4_group if scheme else 0) or INT4_GROUP


def read_model_folder(path: Path | ShapeFolder) -> ModelFolder:
    """Read config.json, and the end-of-sequence ids of generation_config.json where it states them.

    Raises CheckpointError that names the file and the key.
    """
    refuse_unfinished(path)
    raw = read_json(path / "config.json")
    stated = raw.get("quantization_config")
    scheme = find_scheme(str(path / "config.json"), stated) if stated else None
    config = parse_config(raw)
    if (path / "generation_config.json").is_file():
        eos = read_json(path / "generation_config.json").get("eos_token_id")
        if eos is not None:  # it wins: chat models often add their end-of-turn token only here
            config = replace(config, eos_token_ids=_token_ids(path / "generation_config.json", eos))
    return ModelFolder(path, raw, config, find_family(raw), scheme, _fingerprint(raw))


def refuse_unfinished(folder: Path | ShapeFolder) -> None:
    """Raise CheckpointError when `consilium quantize` has not finished writing ``folder``."""
    if (folder / UNFINISHED).is_file():
        raise CheckpointError(
            f"{folder} is half written: `consilium quantize` is at work on it, or was interrupted; finish it with "
            f"`consilium quantize MODEL {folder}`, which goes on where it stopped"
        )


def read_json(file: Path | ShapeFile) -> dict[str, Any]:
    """The JSON object in ``file``. Raises CheckpointError that names the file."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; a model is a Hugging Face folder with config.json") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found {type(content).__name__}")
    return content


def _fingerprint(raw: dict[str, Any]) -> str:
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _token_ids(file: Path | ShapeFile, stated: object) -> tuple[int, ...]:
    ids = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, found {stated!r}")
    return tuple(ids)
