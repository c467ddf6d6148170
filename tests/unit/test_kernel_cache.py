from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from consilium.kernels import compiler


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("CONSILIUM_KERNELS", raising=False)


def test_kernels_are_kept_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "cache"))
    folder = compiler._cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "cache" / "kernels"
    assert folder.stat().st_mode & 0o077 == 0
    assert compiler._cache_folder() == folder


def test_where_the_cache_cannot_be_written_they_go_to_a_temporary_folder_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", os.devnull)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = compiler._cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / f"consilium-kernels-{os.getuid()}"
    other = os.getuid() + 1
    folder.parent.rename(tmp_path / f"consilium-kernels-{other}")
    monkeypatch.setattr(os, "getuid", lambda: other)  # then it is somebody else's
    assert compiler._cache_folder() is None


def test_a_new_folder_begins_with_what_the_image_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "first"))
    first = compiler._cache_folder()
    assert first is not None
    shipped = tmp_path / "shipped" / first.name
    shipped.mkdir(parents=True)
    (shipped / "kernel.nbi").write_text("compiled")
    monkeypatch.setenv("CONSILIUM_CACHE", str(tmp_path / "second"))
    second = compiler._cache_folder()
    assert second is not None
    assert (second / "kernel.nbi").read_text() == "compiled"
    (second / "kernel.nbi").write_text("newer")
    assert compiler._cache_folder() == second
    assert (second / "kernel.nbi").read_text() == "newer"
    assert [each.name for each in second.parent.iterdir()] == [second.name]


def test_a_folder_that_others_can_write_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSILIUM_KERNELS", str(tmp_path / "kernels"))
    assert compiler._cache_folder() is not None
    (tmp_path / "kernels").chmod(0o777)
    assert compiler._cache_folder() is None


def test_every_kernel_can_be_compiled_ahead() -> None:
    """As images do it: a kernel that is called with nonsense there would end the build."""
    done = subprocess.run([sys.executable, "-m", "consilium.kernels"], capture_output=True, text=True, check=True)
    assert "portable" in done.stdout
