"""One router from start to end."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from consilium.config import Config, RouterConfig, TokensConfig
from consilium.errors import ConfigError
from consilium.model_folder import read_model_folder
from consilium.models import resolve_model
from consilium.rpc import ErrorInterceptor, server_options
from consilium.server import catch_signals, listen
from consilium.telemetry import announce
from consilium.tokens import GATEWAY, WORKER, Roles, TokenInterceptor, is_loopback, known_tokens
from protos.router.v1 import router_pb2, router_pb2_grpc
from router_service.controller import Controller
from router_service.deployment import deployment_of
from router_service.metrics import make_registry
from router_service.metrics import serve as serve_metrics
from router_service.redis_store import RedisStore
from router_service.servicer import RouterServicer
from router_service.store import MemoryStore, Store
from router_service.versions import Version, Versions

SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
# Who may call what; a method that is not named here cannot be called at all.
ALLOWED: dict[str, Roles] = {
    "GetDeployment": frozenset({WORKER}),
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
        self._tokens = read_tokens(self.config.host, config.tokens)
        folder = resolve_model(config.model)
        self._model = folder.name
        self._deployment = deployment_of(config, read_model_folder(folder))

    async def serve(self) -> None:
        """Answer until SIGTERM or SIGINT. Raises ConfigError when the port cannot be had."""
        versions = Versions(self._start_version)
        server = grpc.aio.server(interceptors=self._interceptors(), options=server_options())
        router_pb2_grpc.add_RouterServiceServicer_to_server(versions, server)
        status = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        if not self._tokens:
            reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = listen(server, self.config.host, self.config.port)
        scraped = None
        if self.config.metrics_port is not None:
            scraped = serve_metrics(
                make_registry(versions.controllers, self._model), self.config.host, self.config.metrics_port
            )
        stopping = catch_signals()
        await status.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        announce(address, scraped)
        ends = [asyncio.ensure_future(each.wait()) for each in (stopping, versions.failed)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        await status.enter_graceful_shutdown()
        await server.stop(CLOSING_SECONDS)
        await versions.close()

    def _start_version(self, name: str) -> Version:
        store = make_store(self.config, self._deployment.model_fingerprint, name)
        controller = Controller(self._deployment, self.config, store)
        servicer = RouterServicer(self._deployment, self.config, store, controller, self._tokens)
        return Version(store, controller, servicer, asyncio.ensure_future(controller.run()))

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        allowed = {f"/{SERVICE}/{method}": roles for method, roles in ALLOWED.items()}
        checks: list[grpc.aio.ServerInterceptor] = [TokenInterceptor(self._tokens, allowed)] if self._tokens else []
        return [*checks, ErrorInterceptor()]


def read_tokens(host: str, config: TokensConfig) -> dict[str, bytes]:
    """The digest of each role's token; none on loopback without token files. Raises ConfigError."""
    digests = known_tokens(config)
    missing = [role for role in (WORKER, GATEWAY) if role not in digests]
    if missing and (digests or not is_loopback(host)):
        raise ConfigError(
            f"tokens.{missing[0]}_file: a router that listens on {host} needs a secret for workers and one for "
            "gateways; name a file that holds it, or listen on 127.0.0.1"
        )
    return digests


def make_store(config: RouterConfig, model_fingerprint: str, weight_version: str = "") -> Store:
    """In Redis where one is configured, else in memory."""
    if config.redis is None:
        return MemoryStore()
    name = model_fingerprint[:16] + (f"@{weight_version}" if weight_version else "")
    return RedisStore(config.redis.get_secret_value(), name)
