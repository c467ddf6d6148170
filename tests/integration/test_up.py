"""`consilium up` with the real services and a tiny model."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from consilium.mps import CONTROL
from tests.unit.test_mps import SCRIPT

SECONDS = 120.0


@contextmanager
def _up(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`consilium up` as a process with its output in one pipe; killed at the end if it is still there."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIUM_")}
    command = [sys.executable, "-m", "consilium", "up", "--threads", "1", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    """What it writes up to the first line with ``text``; fails where it ends before that."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"no {text!r} in what it wrote:\n{read}")


def _descendants(pid: int) -> set[int]:
    """Processes started by ``pid``, and by those."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def _wait_all_ended(watched: list[int]) -> None:
    """Return when the processes behind these pidfds have ended."""
    for descriptor in watched:
        assert select.select([descriptor], [], [], SECONDS)[0], "a process was left behind"
        os.close(descriptor)


def test_up_answers_and_stops_everything_at_ctrl_c(
    tiny_mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where NVIDIA's MPS is installed (a script stands for it), its daemon runs from before the workers until after."""
    (tmp_path / CONTROL).write_text(SCRIPT)
    (tmp_path / CONTROL).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (tmp_path / "config.yaml").write_text("worker: {device: auto}")
    config = ("--config", str(tmp_path / "config.yaml"))
    with _up("--model", str(tiny_mixtral), "--port", "0", "--workers", "2", *config) as process:
        introduction = _read_until(process, "Ctrl-C stops everything.")
        assert "worker-0 (experts) holds 0-1; worker-1 (experts) holds 2-3" in introduction
        assert "\n> " in introduction
        url = introduction.split("is ready at ")[1].split()[0]
        body = {"model": httpx.get(f"{url}/models").json()["data"][0]["id"], "prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{url}/completions", json=body, timeout=SECONDS).json()["usage"]["completion_tokens"] == 3
        children = _descendants(process.pid)
        assert len(children) >= 4, "two workers, the gateway and its engine"
        watched = [os.pidfd_open(child) for child in children]
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait() == 0
        assert rest.index("shutting down") < rest.index("draining"), "the gateway goes first"
        _wait_all_ended(watched)
        started, *ended = (tmp_path / "log").read_text().splitlines()
        assert started.startswith("started in ")
        assert ended == ["quit"]


def test_nothing_survives_when_up_is_killed(tiny_mixtral: Path) -> None:
    with _up("--model", str(tiny_mixtral), "--port", "0", "--no-demo", "--replicas", "2") as process:
        _read_until(process, "is ready at")
        watched = [os.pidfd_open(child) for child in _descendants(process.pid)]
        assert len(watched) >= 4
        process.kill()
        _wait_all_ended(watched)


def test_a_child_that_dies_at_start_is_shown_and_stops_everything(tiny_mixtral: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with _up("--model", str(tiny_mixtral), "--port", str(port)) as process:
            output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    last = output[
        output.index("error: gateway ended with exit status 1 before everything was ready. Its last lines:") :
    ]
    assert str(port) in last
    assert output.count("draining") == 2, "both workers were stopped in order"


def test_a_worker_that_dies_later_is_told_and_the_gateway_s_death_ends_all(tiny_mixtral: Path) -> None:
    with _up("--model", str(tiny_mixtral), "--port", "0", "--no-demo", "--replicas", "2") as process:
        introduction = _read_until(process, "is ready at")
        url = introduction.split("is ready at ")[1].split()[0]
        os.kill(_named(process.pid, "expert_service"), signal.SIGKILL)
        _read_until(process, "was killed by SIGKILL while it was serving")
        _read_until(process, "The rest goes on without it.")
        body = {"model": httpx.get(f"{url}/models").json()["data"][0]["id"], "prompt": "a", "max_tokens": 3}
        assert httpx.post(f"{url}/completions", json=body, timeout=SECONDS).status_code == 200
        watched = [os.pidfd_open(child) for child in _descendants(process.pid)]
        os.kill(_named(process.pid, "gateway"), signal.SIGKILL)
        _read_until(process, "error: gateway was killed by SIGKILL while it was serving")
        assert process.wait(SECONDS) == 1
        _wait_all_ended(watched)


def test_ctrl_c_while_it_starts_stops_what_has_started(tiny_mixtral: Path) -> None:
    with _up("--model", str(tiny_mixtral), "--port", "0", "--no-demo") as process:
        _read_until(process, "worker-")
        watched = [os.pidfd_open(child) for child in _descendants(process.pid)]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0
        _wait_all_ended(watched)


def test_groups_of_a_file_run_here_with_their_limits(tiny_mixtral: Path, tmp_path: Path) -> None:
    file = tmp_path / "consilium.yaml"
    file.write_text(
        "experts:\n"
        '  vision:\n    endpoint: "grpc://vision-expert:50051"\n    max_batch: 32\n'
        '  language:\n    endpoint: "grpc://language-expert:50051"\n    timeout: 500ms\n'
    )
    with _up("--model", str(tiny_mixtral), "--port", "0", "--config", str(file)) as process:
        introduction = _read_until(process, "Ctrl-C stops everything.")
    assert "worker-0 (vision) holds 0-1; worker-1 (language) holds 2-3" in introduction
    assert "were replaced by those of the local workers" in introduction


@pytest.mark.parametrize("service", ["gateway", "expert"])
def test_services_have_help_of_their_own(service: str) -> None:
    command = [sys.executable, "-m", "consilium", service, "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert f"usage: consilium {service}" in finished.stdout


def _named(pid: int, module: str) -> int:
    """The child of ``pid`` that runs ``python -m module``."""
    for child in sorted(_descendants(pid)):
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        if words[1:3] == ["-m", module]:
            return child
    raise AssertionError(f"{pid} has no child that runs {module}")


def test_up_with_a_cache_of_its_own(tiny_mixtral: Path) -> None:
    """Rows go to a server of the stack; without it the stack goes on, and nothing of it is left at the end."""
    arguments = ("--model", str(tiny_mixtral), "--port", "0", "--workers", "1", "--cache", "16MiB", "--no-demo")
    with _up(*arguments) as process:
        url = _read_until(process, "is ready at ").split("is ready at ")[1].split("/v1")[0]

        def complete() -> dict[str, object]:
            body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0, "logprobs": 2}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS)
            assert answer.status_code == 200, answer.text
            choice: dict[str, object] = answer.json()["choices"][0]
            return choice

        written = re.compile(r"consilium_cache_written_rows_total\{.*\} [1-9]")
        first = complete()
        deadline = time.monotonic() + SECONDS
        while not written.search(httpx.get(f"{url}/metrics").text):
            assert time.monotonic() < deadline
            assert complete() == first
        (server,) = (each for each in _descendants(process.pid) if _program(each) == "valkey-server")
        title = Path(f"/proc/{server}/cmdline").read_text()
        socket_file = re.search(r"unixsocket:(\S+)", title.replace("\0", " "))
        assert socket_file is not None, title
        folder = Path(socket_file[1]).parent
        assert folder.stat().st_mode & 0o077 == 0, "others can enter it"
        os.kill(server, signal.SIGKILL)
        assert complete() == first
        watched = [os.pidfd_open(child) for child in _descendants(process.pid) if _program(child) != "valkey-server"]
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert "The rest goes on without it" in process.stdout.read()
        assert process.wait() == 0
        _wait_all_ended(watched)
        assert not folder.exists()


def _program(pid: int) -> str:
    """Its name; empty where it has just ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
