"""Finding a model by folder or by name."""

from __future__ import annotations

import errno
from pathlib import Path

import huggingface_hub
import pytest

from consilium import hub
from consilium.errors import ConfigError
from consilium.models import cache_folder, resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CONSILIUM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "consilium"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "consilium"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "consilium"
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.usefixtures("cache")
def test_a_folder_with_a_config_is_a_model(tmp_path: Path) -> None:
    folder = _model(tmp_path / "mine")
    assert resolve_model(str(folder)) == folder


def test_a_fetched_model_is_found_by_name(cache: Path) -> None:
    folder = _model(cache / "models" / "default")
    assert resolve_model("default") == folder


@pytest.mark.parametrize("name", ["default", "no-such-model", "../models/default"])
@pytest.mark.usefixtures("cache")
def test_a_missing_model_says_how_to_get_it(name: str) -> None:
    with pytest.raises(ConfigError, match="consilium model fetch default"):
        resolve_model(name)


@pytest.mark.usefixtures("cache")
def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))


def test_a_folder_comes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _model(tmp_path / "org" / "name")
    assert resolve_model("org/name") == Path("org/name")
    names = (
        "org/name",
        "org/name@main",
        "a-b.c/d_e@refs/pr/1",
        "./name",
        "/org/name",
        "../name",
        "org/name/x",
        "name",
        "",
    )
    assert [hub.is_repository(name) for name in names] == [True] * 3 + [False] * 6


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ConfigError, match=r"^model org/name: the disk of .* is full; make room, or set HF_HOME"):
        hub.download("org/name")
    assert not list(tmp_path.iterdir())
