"""One router from start to end."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from consilium.config import Config, RouterConfig
from consilium.errors import ConfigError
from consilium.model_folder import read_model_folder
from consilium.models import resolve_model
from consilium.rpc import ErrorInterceptor, server_options
from consilium.server import catch_signals, listen
from consilium.telemetry import announce
from consilium.tokens import Roles, TokenInterceptor, is_loopback, read_token
from protos.router.v1 import router_pb2, router_pb2_grpc
from router_service.controller import Controller
from router_service.deployment import deployment_of
from router_service.redis_store import RedisStore
from router_service.servicer import RouterServicer
from router_service.store import MemoryStore, Store

SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
WORKER, GATEWAY = "worker", "gateway"
# Who may call what; a method that is not named here cannot be called at all.
ALLOWED: dict[str, Roles] = {
    "Register": frozenset({WORKER}),
    "Heartbeat": frozenset({WORKER}),
    "Drain": frozenset({WORKER}),
    "WatchPlacement": frozenset({GATEWAY}),
    "Acknowledge": frozenset({GATEWAY}),
    "ReportLoad": frozenset({GATEWAY}),
    "GetPlacement": frozenset({WORKER, GATEWAY}),
}
CLOSING_SECONDS = 1.0


class Router:
    """A router with all that it needs; ready when constructed."""

    def __init__(self, config: Config) -> None:
        """Raises ConsiliumError that says what is wrong."""
        self.config = config.router or RouterConfig()
        self._tokens = read_tokens(self.config)
        self._deployment = deployment_of(config, read_model_folder(resolve_model(config.model)))

    async def serve(self) -> None:
        """Answer until SIGTERM or SIGINT. Raises ConfigError when the port cannot be had."""
        store = make_store(self.config, self._deployment.model_fingerprint)
        controller = Controller(self._deployment, self.config, store)
        server = grpc.aio.server(interceptors=self._interceptors(), options=server_options())
        servicer = RouterServicer(self._deployment, self.config, store, controller)
        router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        if not self._tokens:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = listen(server, self.config.host, self.config.port)
        stopping = catch_signals()
        await status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        leading = asyncio.ensure_future(controller.run())
        announce(address)
        await asyncio.wait([leading, asyncio.ensure_future(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        await status.enter_graceful_shutdown()
        await server.stop(CLOSING_SECONDS)
        leading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leading
        await store.close()

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        allowed = {f"/{SERVICE}/{method}": roles for method, roles in ALLOWED.items()}
        checks: list[grpc.aio.ServerInterceptor] = [TokenInterceptor(self._tokens, allowed)] if self._tokens else []
        return [*checks, ErrorInterceptor()]


def read_tokens(config: RouterConfig) -> dict[str, str]:
    """The token of each role; none on loopback without token files. Raises ConfigError."""
    files = {WORKER: config.worker_token_file, GATEWAY: config.gateway_token_file}
    if not any(files.values()) and is_loopback(config.host):
        return {}
    tokens = {}
    for role, file in files.items():
        key = f"router.{role}_token_file"
        if file is None:
            raise ConfigError(
                f"{key}: a router that listens on {config.host} needs a secret for workers and one for gateways; name "
                "a file that holds it, or listen on 127.0.0.1"
            )
        tokens[role] = read_token(file, key)
    if len(set(tokens.values())) < len(tokens):
        raise ConfigError("router.worker_token_file and router.gateway_token_file must hold different secrets")
    return tokens


def make_store(config: RouterConfig, model_fingerprint: str) -> Store:
    """In Redis where one is configured, else in memory."""
    if config.redis is None:
        return MemoryStore()
    return RedisStore(config.redis.get_secret_value(), model_fingerprint[:16])
