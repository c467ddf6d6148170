"""MPS without a GPU: a script in the daemon's place says what it was told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from consilium import mps

SCRIPT = """#!/bin/sh
control="$CUDA_MPS_PIPE_DIRECTORY/control"
if [ "$1" = -d ]; then
    [ -e "$LOG.refuse" ] && exit 3
    echo "started in $CUDA_MPS_PIPE_DIRECTORY with $CUDA_MPS_LOG_DIRECTORY" >>"$LOG"
    touch "$control"
    exit 0
fi
read -r command
[ -e "$control" ] || exit 1
echo "$command" >>"$LOG"
[ "$command" = quit ] && rm "$control"
exit 0
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What the daemon was told until now."""
    log, script = tmp_path / "log", tmp_path / "bin" / mps.CONTROL
    script.parent.mkdir()
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv(mps.PIPES, str(tmp_path / "nobody"))
    return lambda: log.read_text().splitlines() if log.exists() else []


def fail(message: str) -> None:
    pytest.fail(message)


def test_a_daemon_of_our_own_is_found_by_its_folders_and_ended(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not mps.is_serving()
    with mps.shared("auto", fail) as environ:
        assert told() == [f"started in {environ[mps.PIPES]} with {environ[mps.LOGS]}"]
        assert environ[mps.QUEUES] == mps.USUAL_QUEUES
        monkeypatch.setenv(mps.PIPES, environ[mps.PIPES])
        assert mps.is_serving()
        with mps.shared("auto", fail) as nothing:  # one is running already: it is not ours to end
            assert nothing == {}
        assert mps.is_serving()
    assert told()[-1] == "quit"
    assert not mps.is_serving()
    assert not Path(environ[mps.PIPES]).exists()


def test_none_is_started_for_cpus_or_where_none_is_installed(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with mps.shared("cpu", fail) as environ:
        assert environ == {}
    assert mps.is_installed()
    monkeypatch.setenv("PATH", "")
    with mps.shared("cuda", fail) as environ:
        assert environ == {}
    assert told() == []


def test_one_that_does_not_start_is_said_and_done_without(told: Callable[[], list[str]]) -> None:
    Path(f"{os.environ['LOG']}.refuse").touch()
    said: list[str] = []
    with mps.shared("cuda", said.append) as environ:
        assert environ == {}
    assert len(said) == 1
    assert "nvidia-cuda-mps-control -d does not start" in said[0]
    assert told() == []
