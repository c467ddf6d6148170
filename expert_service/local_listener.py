"""Where gateways on this host find this worker: sockets in the abstract namespace and, if asked for, in a folder.

The abstract name needs no file, so nothing is left behind however the process ends; containers that have networks of
their own do not see it, and share a folder instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from consilium.errors import ConfigError, WireError
from consilium.frames import PROTOCOL_VERSION
from consilium.local_socket import new_socket, receive_with_descriptor, socket_address
from consilium.shared_memory import SharedMemory
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)

BACKLOG = 16
HELLO_SECONDS = 5.0
SUFFIX = ".consilium"  # of socket files


class LocalListener:
    """Accepts links on the event loop, and hands the good ones over."""

    def __init__(
        self, worker_id: str, folder: Path | None, adopt: Callable[[socket.socket, SharedMemory], None]
    ) -> None:
        """``adopt`` gets every link with its memory. Raises ConfigError when ``folder`` cannot be used."""
        self._worker_id, self._adopt = worker_id, adopt
        self.names = [f"@consilium-{worker_id}"]
        if folder is not None:
            _remove_dead_sockets(folder)
            self.names.append(str(folder / f"{worker_id}{SUFFIX}"))
        self._sockets: list[socket.socket] = []
        self._greetings: set[asyncio.Task[None]] = set()
        for name in self.names:
            self._sockets.append(_listen(name))
        for listening in self._sockets:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def close(self) -> None:
        """Accept no more links; those there are go on."""
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        for name in self.names:
            if not name.startswith("@"):
                Path(name).unlink(missing_ok=True)

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            link, _ = listening.accept()
            link.setblocking(False)
            task = asyncio.ensure_future(self._greet(link))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)

    async def _greet(self, link: socket.socket) -> None:
        try:
            await asyncio.wait_for(_readable(link), HELLO_SECONDS)
            memory = self._read_hello(link)
            link.send(expert_pb2.LinkWelcome(protocol_version=PROTOCOL_VERSION).SerializeToString())
        except WireError as error:
            logger.warning("a local link is refused: %s", error.message)
            with contextlib.suppress(OSError):
                link.send(expert_pb2.LinkWelcome(error=error.message).SerializeToString())
            link.close()
        except (OSError, TimeoutError):
            link.close()
        else:
            self._adopt(link, memory)

    def _read_hello(self, link: socket.socket) -> SharedMemory:
        packet, descriptor = receive_with_descriptor(link)
        try:
            hello = expert_pb2.LinkHello.FromString(packet)
            if hello.protocol_version != PROTOCOL_VERSION:
                raise WireError(f"protocol version {hello.protocol_version}; this worker's is {PROTOCOL_VERSION}")
            if hello.worker_id != self._worker_id:
                raise WireError(f"it is meant for worker {hello.worker_id[:64]!r}, this is {self._worker_id}")
            return SharedMemory.attach(descriptor)
        except DecodeError:
            raise WireError("the first packet is no LinkHello") from None
        finally:
            os.close(descriptor)


async def _readable(link: socket.socket) -> None:
    """Wait until there is something to read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(link, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(link)


def _listen(name: str) -> socket.socket:
    made = new_socket()
    try:
        made.bind(socket_address(name))
        if not name.startswith("@"):
            Path(name).chmod(0o666)  # as open as the port beside it; the folder says who may
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {name}: {error.strerror}; choose another --socket-folder") from None
    return made


def _remove_dead_sockets(folder: Path) -> None:
    """What workers that were killed have left there. Raises ConfigError when the folder cannot be read."""
    try:
        found = [each for each in folder.iterdir() if each.suffix == SUFFIX]
    except OSError as error:
        raise ConfigError(f"worker.socket_folder: {folder}: {error.strerror}; it must exist") from None
    for file in found:
        with new_socket() as probe:
            if probe.connect_ex(str(file)) == errno.ECONNREFUSED:
                file.unlink(missing_ok=True)
