"""Models of a Hugging Face hub: ORG/NAME, or ORG/NAME@REVISION, downloaded into Hugging Face's own cache.

huggingface_hub does the work, so its environment holds: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE. What is there
already is used without asking the hub, so that every process of a deployment finds the same weights; `consilium model
fetch` asks for newer ones. A connection that breaks is taken up again within the file; a process that was killed goes
on with the files that it had not finished.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from consilium.errors import CheckpointError, ConfigError
from consilium.model_folder import read_json, read_model_folder
from consilium.tensor_index import INDEX_FILE, SINGLE_FILE, check_index

# Everything but weights that is read of a model folder, and its licence.
SMALL_FILES = ("*.json", "*.jinja", "tokenizer*", "LICENSE*")
# Copies for other programs, in folders of their own.
LEFT_OUT = "*/*"
_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def is_repository(name: str) -> bool:
    """Whether ``name`` can be that of a repository."""
    return _NAME.fullmatch(name) is not None


def find_repository(name: str) -> Path:
    """The folder of the model ``name``; downloaded unless all of it is there. Raises as ``download`` does."""
    return _cached(*_parse(name)) or download(name)


def download(name: str) -> Path:
    """The folder of the model ``name`` as the hub has it now; only what is missing is downloaded, of weights only
    the safetensors files that the model's index names.

    Raises ConfigError (it cannot be had: what to do), CheckpointError (it is no model that is served).
    """
    repo, revision = _parse(name)
    folder = _snapshot(repo, revision, SMALL_FILES)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} on the hub has no config.json; it is no model in Hugging Face's layout")
    read_model_folder(folder)  # before gigabytes are downloaded that nothing here can serve
    folder = _snapshot(repo, folder.name, (*SMALL_FILES, *_weights(folder)))
    if not _complete(folder):
        raise CheckpointError(
            f"{name} on the hub has neither {SINGLE_FILE} nor all files of {INDEX_FILE}; only safetensors are read"
        )
    return folder


def _parse(name: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name!r} is no repository of a hub; expected ORG/NAME or ORG/NAME@REVISION")
    return match["repo"], match["revision"]


def _weights(folder: Path) -> tuple[str, ...]:
    """The files that hold the weights."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return (SINGLE_FILE,)
    return tuple(sorted(set(check_index(index, read_json(index).get("weight_map")).values())))


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and all((folder / file).is_file() for file in _weights(folder))


def _cached(repo: str, revision: str | None) -> Path | None:
    """The folder in the cache, where all weights are in it."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and _complete(folder) else None


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download the files of these ``patterns``. Raises ConfigError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=LEFT_OUT))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {repo}: {_explain(repo, revision, error)}") from error


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    """What to do about ``error``."""
    from huggingface_hub import constants, errors

    endpoint, chain = constants.ENDPOINT, list(_causes(error))

    def any_is(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    if any(isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT) for each in chain):
        return (
            f"the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to another one, and start again"
        )
    if any_is(errors.GatedRepoError):
        return f"access is given on request: accept its terms at {endpoint}/{repo}, then set HF_TOKEN to your token"
    if any_is(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; see {endpoint}/{repo}"
    if any_is(errors.RepositoryNotFoundError):
        return (
            f"there is no such folder here and no such repository at {endpoint}; is the name right? If it is private, "
            "set HF_TOKEN to a token that may read it"
        )
    if any_is(errors.OfflineModeIsEnabled):
        return "it is not here in full, and HF_HUB_OFFLINE forbids to download it; unset that, or copy its folder here"
    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if status == 401:
        return f"{endpoint} does not accept the token; set HF_TOKEN to a valid one, or unset it"
    if status is not None:
        return f"{endpoint} answered with status {status}; finished files are kept, so try again later"
    return f"cannot reach {endpoint} ({chain[-1]}); finished files are kept, so try again, or copy its folder here"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
