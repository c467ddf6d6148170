"""Whom a worker answers: gateways that ask for rows, and workers that fetch weights."""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from consilium.config import Config
from consilium.errors import ConfigError
from consilium.tokens import GATEWAY, WORKER, Roles, TokenInterceptor, is_loopback, known_tokens
from expert_service.servicer import SERVICE

# A method that is not named here can be called by anybody: the health service's.
ALLOWED: dict[str, Roles] = {
    "Describe": frozenset({GATEWAY, WORKER}),
    "Forward": frozenset({GATEWAY}),
    "ForwardOnce": frozenset({GATEWAY}),
    "FetchWeights": frozenset({WORKER}),
}


class Tokens:
    """The tokens of one worker: from its files, or from its router."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError where everybody could call a worker that listens beyond this machine."""
        self._digests = known_tokens(config.tokens)
        self._host, open_to_all = config.worker.host, is_loopback(config.worker.host)
        self.asked = not open_to_all or GATEWAY in self._digests
        joins = config.router is not None and config.router.endpoint is not None
        if not open_to_all and GATEWAY not in self._digests and not joins:
            raise ConfigError(self._needed("name a file that holds it, join a router that has one,"))

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """What a server puts first; nothing where everybody may call."""
        allowed = {f"/{SERVICE}/{method}": roles for method, roles in ALLOWED.items()}
        return [TokenInterceptor(self._digests, allowed)] if self.asked else []

    def learn(self, digests: Mapping[str, bytes]) -> None:
        """What the router says. Raises ConfigError where that leaves nobody who may call."""
        if self.asked:
            self._digests.update(digests)
        if self.asked and GATEWAY not in self._digests:
            raise ConfigError(self._needed("the router asks for none; give it secrets,"))

    def _needed(self, what: str) -> str:
        return (
            f"tokens.gateway_file: a worker that listens on {self._host} answers only to gateways that show a secret; "
            f"{what} or listen on 127.0.0.1 (--host)"
        )
