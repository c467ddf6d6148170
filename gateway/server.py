"""The HTTP process from its start to its exit status: starts the engine, listens once that is loaded, drains."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn

from consilium.config import Config
from consilium.errors import ConfigError
from consilium.telemetry import announce
from gateway.app import create_app
from gateway.engine_client import EngineClient
from gateway.engine_launch import end_engine, launch_engine
from gateway.metrics import Metrics
from gateway.served_model import ServedModel
from gateway.state import Gateway

log = logging.getLogger(__name__)

_BACKLOG = 2048
_LARGEST_HEADERS = 64 * 2**10
_KEEP_ALIVE_SECONDS = 75  # longer than the minute after which most load balancers drop an idle connection
_SECONDS_TO_SEND = 5  # for the last bytes of answers that are already complete


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, announcing its address."""

    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self._address = address

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        announce(self._address)


async def serve(config: Config, model: ServedModel) -> int:
    """Run until SIGTERM or SIGINT (0), or until the engine ends by itself (1). Raises ConfigError for the address."""
    listener = _bind(config)
    stopping = _watch_signals()
    process, link = await launch_engine(config)
    metrics = Metrics(model.name, process.pid, all_experts=config.gateway.metrics_all_experts)
    capacity = config.gateway.max_running + config.gateway.max_waiting
    engine = await EngineClient.connect(link, capacity, metrics.step, metrics.status, metrics.report)
    metrics.watch_ready(lambda: engine.why_not_ready() is None)
    try:
        # Nobody gets in before the weights are seen to be right.
        await _first_of(engine.loaded.wait(), engine.gone.wait(), stopping.wait())
        lost = engine.gone.is_set()
        if engine.loaded.is_set() and not stopping.is_set():
            lost = await _answer(Gateway(config, model, engine, metrics), listener, stopping)
    finally:
        await engine.close()
        status = await end_engine(process)
    if lost:
        log.error("the engine process ended by itself with status %d; its last lines above say why", status)
    return int(lost)


async def _answer(gateway: Gateway, listener: socket.socket, stopping: asyncio.Event) -> bool:
    """Answer requests until ``stopping`` is set and what runs is done; True when the engine ended before."""
    _open(listener, gateway.config)
    engine, server = gateway.engine, _make_server(gateway, _address(listener))
    serving = asyncio.create_task(server.serve([listener]))
    await _first_of(stopping.wait(), engine.gone.wait(), asyncio.shield(serving))
    lost = engine.gone.is_set() or not await _drain(engine, gateway.config.gateway.drain_timeout)
    await engine.close()  # what is still open fails now, so that its answers can still go out
    server.should_exit = True
    await serving
    return lost


async def _drain(engine: EngineClient, seconds: float) -> bool:
    """Let what is running finish, within ``seconds``; False when the engine ended meanwhile."""
    log.info("shutting down: %d sequences may finish within %g s", engine.open_sequences, seconds)
    engine.drain()
    await _first_of(engine.idle.wait(), engine.gone.wait(), seconds=seconds)
    if engine.open_sequences:
        log.warning("%d sequences were not done in time and fail", engine.open_sequences)
    return not engine.gone.is_set()


def _watch_signals() -> asyncio.Event:
    """Set at the first SIGTERM or SIGINT; at the second the process ends at once, and the engine with it."""
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stopping


async def _first_of(*waits: Coroutine[Any, Any, Any] | asyncio.Future[Any], seconds: float | None = None) -> None:
    tasks = [asyncio.ensure_future(each) for each in waits]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _make_server(gateway: Gateway, address: str) -> _Server:
    settings = uvicorn.Config(
        create_app(gateway),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=_LARGEST_HEADERS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_SECONDS_TO_SEND,
    )
    return _Server(settings, address)


def _bind(config: Config) -> socket.socket:
    """The gateway's address, taken; nobody can connect to it yet. Raises ConfigError when it cannot be had."""
    host, port = config.gateway.host, config.gateway.port
    # asyncio turns Nagle's algorithm off only where the protocol is stated; with it every small answer takes 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _unavailable(config, error) from None
    return listener


def _open(listener: socket.socket, config: Config) -> None:
    """Let clients connect. Raises ConfigError when another process has begun to listen there since."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _unavailable(config, error) from None


def _unavailable(config: Config, error: OSError) -> ConfigError:
    reason = f"cannot listen on {config.gateway.host} port {config.gateway.port}: {error.strerror}"
    return ConfigError(f"{reason}; choose another with --host and --port")


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
