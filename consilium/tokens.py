"""Who may call what: a shared secret for each role, shown with every RPC of a service that listens to the network.

Secrets travel in the open until the connection is encrypted; on one host nobody sees them.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from consilium.errors import ConfigError, Forbidden, InvalidRequest, Unauthenticated

SHORTEST_TOKEN = 16  # characters
_HEADER = "authorization"
_SCHEME = "Bearer "

Roles = frozenset[str]


def read_token(file: Path, key: str) -> str:
    """The secret in ``file``, without the white space around it. Raises ConfigError that names ``key``."""
    try:
        token = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{key}: cannot read {file}: {reason}") from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or any(each.isspace() for each in token):
        raise ConfigError(f"{key}: {file} must hold one word of at least {SHORTEST_TOKEN} ASCII characters")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What to send with an RPC."""
    return () if token is None else ((_HEADER, _SCHEME + token),)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses RPCs without the token of a role that may call the method; methods that are not named are open."""

    def __init__(self, tokens: Mapping[str, str], allowed: Mapping[str, Roles]) -> None:
        """``tokens`` by role; ``allowed`` are the roles that may call each method, by its full name."""
        self._tokens, self._allowed = tokens, allowed

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        roles = self._allowed.get(handler_call_details.method)
        if roles is None or handler is None:
            return handler
        try:
            self._check(dict(handler_call_details.invocation_metadata or ()).get(_HEADER, ""), roles)
        except InvalidRequest as error:
            return _refusal(handler, error)
        return handler

    def _check(self, shown: object, roles: Roles) -> None:
        given = shown if isinstance(shown, str) else ""
        # Every token is compared, so that the time taken says nothing.
        matches = {
            role
            for role, token in self._tokens.items()
            if hmac.compare_digest(given.encode(), (_SCHEME + token).encode())
        }
        if not matches:
            raise Unauthenticated("this router asks for a token; start with the file that holds it")
        if not matches & roles:
            raise Forbidden(f"the token is that of a {min(matches)}; this call is for a {' or a '.join(sorted(roles))}")


def _refusal(handler: grpc.RpcMethodHandler[Any, Any], error: InvalidRequest) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode[error.grpc_code], error.message)

    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(refuse, handler.request_deserializer, handler.response_serializer)
