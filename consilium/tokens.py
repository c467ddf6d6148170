"""Who may call what: a shared secret for each role, shown with every RPC of a service that listens to the network.

Services know secrets by their SHA-256, so a worker that joins learns from its router whom to answer without learning a
gateway's secret. Secrets travel in the open until connections are encrypted; on one host nobody sees them. (With mutual
TLS a role would be what the peer's certificate says: `TokenInterceptor._roles` is the place.)
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from consilium.config import TokensConfig
from consilium.errors import ConfigError, Forbidden, InvalidRequest, Unauthenticated

WORKER, GATEWAY = "worker", "gateway"  # the roles
SHORTEST_TOKEN = 16  # characters
_HEADER = "authorization"
_SCHEME = "Bearer "

Roles = frozenset[str]
Metadata = tuple[tuple[str, str], ...]


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


def token_metadata(token: str | None) -> Metadata:
    """What to send with an RPC."""
    return () if token is None else ((_HEADER, _SCHEME + token),)


def metadata_of(config: TokensConfig, role: str) -> Metadata:
    """What this process sends with its RPCs in that role. Raises ConfigError when the token cannot be read."""
    file = config.file_of(role)
    return token_metadata(None if file is None else read_token(file, f"tokens.{role}_file"))


def token_digest(token: str) -> bytes:
    """What a service needs to know of a token."""
    return hashlib.sha256(token.encode()).digest()


def known_tokens(config: TokensConfig) -> dict[str, bytes]:
    """The digest of every role's token that there is a file for. Raises ConfigError."""
    digests = {
        role: token_digest(read_token(file, f"tokens.{role}_file"))
        for role in (WORKER, GATEWAY)
        if (file := config.file_of(role)) is not None
    }
    if len(set(digests.values())) < len(digests):
        raise ConfigError("tokens.worker_file and tokens.gateway_file must hold different secrets")
    return digests


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses RPCs without the token of a role that may call the method; methods that are not named are open."""

    def __init__(self, digests: Mapping[str, bytes], allowed: Mapping[str, Roles]) -> None:
        """``digests`` of tokens by role; ``allowed`` are the roles that may call each method, by its full name.

        ``digests`` may change later. Without any nobody may call what is named.
        """
        self._digests, self._allowed = digests, allowed

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
        matches = self._roles(shown if isinstance(shown, str) else "")
        if not matches:
            raise Unauthenticated("this service asks for a token; start with the file that holds it (--token-file)")
        if not matches & roles:
            raise Forbidden(f"the token is that of a {min(matches)}; this call is for a {' or a '.join(sorted(roles))}")

    def _roles(self, shown: str) -> Roles:
        """Every digest is compared, so that the time taken says nothing."""
        given = token_digest(shown.removeprefix(_SCHEME))
        return frozenset(role for role, digest in self._digests.items() if hmac.compare_digest(given, digest))


def _refusal(handler: grpc.RpcMethodHandler[Any, Any], error: InvalidRequest) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode[error.grpc_code], error.message)

    if handler.request_streaming:
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = grpc.stream_stream_rpc_method_handler
    else:
        streaming = handler.response_streaming
        make = grpc.unary_stream_rpc_method_handler if streaming else grpc.unary_unary_rpc_method_handler
    return make(refuse, handler.request_deserializer, handler.response_serializer)
