"""Where gateways on this host find this worker: sockets in the abstract namespace and, if asked for, in a folder.

The abstract name needs no file, so nothing is left behind however the process ends; containers that have networks of
their own do not see it, and share a folder instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
PAUSE_SECONDS = 1.0
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
            self.names.append(str(folder.absolute() / f"{worker_id}{SUFFIX}"))
        self._greetings: set[asyncio.Task[None]] = set()
        with _alone_in(folder):
            self._sockets = [_listen(name) for name in self.names]
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
        try:
            link, _ = listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # too many files are open; it would be readable, and fail, again and again
            logger.warning("no local links for %g s: %s", PAUSE_SECONDS, error.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            loop.call_later(PAUSE_SECONDS, self._resume, listening)
            return
        link.setblocking(False)
        task = asyncio.ensure_future(self._greet(link))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

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
        why = error.strerror or error  # Python's own errors, of names that are too long, have no strerror
        raise ConfigError(f"cannot listen on {name}: {why}; choose another worker.socket_folder") from None
    return made


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Clear the folder, and keep others from it: a socket that does not listen yet looks as dead as one of the killed.

    Raises ConfigError when the folder cannot be used.
    """
    if folder is None:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"worker.socket_folder: {folder}: {error.strerror}; it must be a folder that exists"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _remove_dead_sockets(folder)
        yield
    finally:
        os.close(descriptor)


def _remove_dead_sockets(folder: Path) -> None:
    """What workers that were killed have left there."""
    for file in folder.glob(f"*{SUFFIX}"):
        with new_socket() as probe, contextlib.suppress(OSError):  # another user's, or its name is too long
            if file.is_socket() and probe.connect_ex(str(file)) == errno.ECONNREFUSED:
                file.unlink(missing_ok=True)
