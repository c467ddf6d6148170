"""Where models are found: a folder on disk, a fetched model in the user's cache, a shape in memory, or a hub."""

from __future__ import annotations

import os
from pathlib import Path

from consilium.errors import ConfigError
from consilium.hub import find_repository, is_repository
from consilium.model_folder import refuse_unfinished
from consilium.shapes.folder import PREFIX, ShapeFolder, parse_shape

# The names that `consilium model fetch` knows.
FETCHABLE = ("default",)


def cache_folder() -> Path:
    """Where fetched models are kept: $CONSILIUM_CACHE, else `consilium` in the user's cache folder (XDG)."""
    chosen = os.environ.get("CONSILIUM_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    # The XDG specification says that a relative XDG_CACHE_HOME is to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "consilium"


def fetched_folder(name: str) -> Path:
    """Where the fetched model ``name`` is kept, or will be."""
    return cache_folder() / "models" / name


def is_model_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like a complete Hugging Face model folder."""
    return (folder / "config.json").is_file()


def resolve_model(name: str) -> Path | ShapeFolder:
    """The model that ``name`` stands for: a folder, a fetched model, a shape (``shape:…``), or a hub's (ORG/NAME).

    What a hub has is downloaded unless it is here.

    Raises ConfigError that says how to get the model, CheckpointError when the folder is half written.
    """
    folder = Path(name).expanduser()
    if is_model_folder(folder):
        return folder
    if name.startswith(PREFIX):
        return parse_shape(name)
    if name in FETCHABLE:
        if is_model_folder(fetched_folder(name)):
            return fetched_folder(name)
        raise ConfigError(
            f"the model {name!r} is not in {cache_folder()} yet; fetch it with: consilium model fetch {name}"
        )
    if folder.is_dir():
        refuse_unfinished(folder)
        raise ConfigError(f"model: {name} has no config.json; give a Hugging Face model folder (with *.safetensors)")
    if is_repository(name):
        return find_repository(name)
    raise ConfigError(
        f"model: there is no folder {name!r}; give a Hugging Face model folder, the name of a fetched model "
        f"({', '.join(FETCHABLE)}: consilium model fetch {FETCHABLE[0]}), a shape ({PREFIX}olmoe-1b-7b), or "
        "ORG/NAME of a hub"
    )
