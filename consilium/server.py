"""What every gRPC server of ours does at its start: take its port, say where it is, and listen to signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import grpc

from consilium.config import split_endpoint
from consilium.errors import ConfigError


def listen(server: grpc.aio.Server, host: str, port: int) -> str:
    """Take the port, and return the address that clients dial."""
    bracketed = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{bracketed}:{port}")
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {bracketed}:{port}: the port is taken, or the address is not this machine's; "
            "choose others with --host and --port (0 lets the system choose)"
        ) from error
    return f"grpc://{bracketed}:{bound}"


def advertised(address: str, peer: str) -> str:
    """HOST:PORT where others reach a server that listens on ``address``; both are grpc://HOST:PORT.

    Where that is every interface, it is the one that leads to ``peer``. Raises ConfigError when none does.
    """
    host, port = split_endpoint(address)
    if host in ("0.0.0.0", "::"):
        try:
            family, kind, _, _, target = socket.getaddrinfo(*split_endpoint(peer), type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # of UDP: nothing is sent
                host = str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"worker.advertise: no way to {peer} ({error}); say HOST:PORT where gateways reach it"
            ) from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def catch_signals() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; the second one ends the process at once."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopping
