"""NVIDIA's Multi-Process Service: without it, processes that share a GPU take turns, some 0.3 ms each.

Its control daemon is found by a folder of pipes, which every CUDA program looks for as it starts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from consilium.errors import ConfigError

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
# A program's queues to the GPU, of which MPS shares out one pool: as many as it asks for. Streams that share a queue
# wait for each other, also for one that waits for another process.
QUEUES, USUAL_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS", "8"
DEFAULT_PIPES = "/tmp/nvidia-mps"  # noqa: S108 (NVIDIA's default)
SECONDS = 10.0
# A daemon that inherited a pipe would hold it open.
_SILENT: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def is_installed() -> bool:
    """Whether there is a daemon to start: it comes with the driver."""
    return shutil.which(CONTROL) is not None


def is_serving() -> bool:
    """Whether the daemon that CUDA programs started from here would find is there, and answers."""
    pipes = Path(os.environ.get(PIPES, DEFAULT_PIPES))
    return (pipes / "control").exists() and _ask("get_default_active_thread_percentage", dict(os.environ))


@contextmanager
def shared(device: str, say: Callable[[str], None]) -> Iterator[dict[str, str]]:
    """Variables for processes that may share a GPU, by ``worker.device``; a daemon serves them while this is open.

    None is started for CPUs, where none is installed, or where one is running already. ``say`` hears why it does not
    start: everything works without it, only slower.
    """
    with ExitStack() as stack:
        environ: dict[str, str] = {}
        if device != "cpu" and is_installed() and not is_serving():
            try:
                environ = stack.enter_context(running())
            except ConfigError as error:
                say(f"{error.message}; processes that share a GPU will take turns, some 0.3 ms each")
        yield environ


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """A daemon of our own while this is open; gives the variables by which programs find it.

    Raises ConfigError when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="consilium-mps-", ignore_cleanup_errors=True) as folder:
        places = {PIPES: str(Path(folder) / "pipes"), LOGS: str(Path(folder) / "logs")}
        for each in places.values():
            Path(each).mkdir()
        environ = {**os.environ, **places}
        try:
            subprocess.run([CONTROL, "-d"], env=environ, check=True, timeout=SECONDS, **_SILENT)
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"{CONTROL} -d does not start: {error}") from None
        try:
            yield places | {QUEUES: os.environ.get(QUEUES, USUAL_QUEUES)}
        finally:
            _ask("quit", environ)


def _ask(command: str, environ: dict[str, str]) -> bool:
    """Whether the daemon takes a command."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [CONTROL], input=f"{command}\n", env=environ, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        return True
    return False
