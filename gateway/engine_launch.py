"""Starts the engine process, and ends it."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from asyncio.subprocess import DEVNULL, Process

from consilium.config import Config
from gateway.messages import LENGTH_BYTES

_STDERR = 2  # the engine's standard output goes to our standard error: ours has one line that others parse
_SECONDS_TO_END = 10.0


async def launch_engine(config: Config) -> tuple[Process, socket.socket]:
    """The engine process and our end of the socket to it; the configuration, without API keys, is already sent."""
    ours, theirs = socket.socketpair()
    with theirs:
        handle = theirs.fileno()
        command = (sys.executable, "-m", "gateway.engine_process", str(handle))
        process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=_STDERR, pass_fds=(handle,))
    settings = config.model_dump(mode="json")
    if config.cache is not None:  # the engine needs these two secrets, which only show themselves when asked to
        redis, salt = config.cache.redis, config.cache.salt
        settings["cache"] |= {"redis": redis and redis.get_secret_value(), "salt": salt.get_secret_value()}
    content = json.dumps(settings).encode()
    ours.sendall(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    return process, ours


async def end_engine(process: Process) -> int:
    """The exit status of the engine, which ends by itself once its socket is closed; else it is killed."""
    try:
        return await asyncio.wait_for(process.wait(), _SECONDS_TO_END)
    except TimeoutError:
        process.kill()
        return await process.wait()
