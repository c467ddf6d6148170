"""gRPC in one place: the options of channels and servers, and our errors as gRPC statuses and back.

Inside a Forward stream errors travel as CallError, one for each failed call; the status of a whole RPC is used only
where there is one answer to it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from consilium.errors import (
    Cancelled,
    ConfigError,
    ConsiliumError,
    DeadlineExceeded,
    ExpertUnavailable,
    Forbidden,
    InvalidRequest,
    Overloaded,
    StalePlacement,
    Unauthenticated,
    UnknownModel,
    WireError,
)
from protos.expert.v1 import expert_pb2

logger = logging.getLogger(__name__)

Options = list[tuple[str, int]]

DEFAULT_MAX_FRAME = 64 * 2**20
PING_INTERVAL_MS = 20_000
PING_TIMEOUT_MS = 10_000

_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel_options(max_frame: int = DEFAULT_MAX_FRAME) -> Options:
    """Options of a client's channel to a server whose largest frame is ``max_frame`` bytes.

    Every channel gets a connection of its own: by default gRPC lets channels to one target share one.
    """
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    # Workers are on the private network, often on this machine: an http_proxy is not meant for them.
    return [*_message_sizes(max_frame), *_KEEPALIVE, *own_connection, ("grpc.enable_http_proxy", 0)]


def router_channel_options() -> Options:
    """Options of a channel to a router, which is looked for again at once when it is gone."""
    reconnect = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]
    return [*channel_options(), *reconnect, ("grpc.max_reconnect_backoff_ms", 1000)]


def server_options(max_frame: int = DEFAULT_MAX_FRAME) -> Options:
    """Options of a server whose largest frame is ``max_frame`` bytes.

    It accepts pings as often as our clients send them (by default gRPC drops such clients), and never shares its
    port with another process (by default two servers on one port share the connections silently).
    """
    pings = [("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS // 2)]
    return [*_message_sizes(max_frame), *_KEEPALIVE, *pings, ("grpc.so_reuseport", 0)]


def _message_sizes(max_frame: int) -> Options:
    """gRPC ends the whole stream at a message over its limit; a frame over ours only fails its own call.

    So gRPC's limit is twice ours, within the 2^31 - 1 that it can count.
    """
    limit = min(2 * max_frame, 2**31 - 1)
    return [("grpc.max_send_message_length", limit), ("grpc.max_receive_message_length", limit)]


_ERRORS: dict[str, type[ConsiliumError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": Forbidden,
    "NOT_FOUND": UnknownModel,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": ExpertUnavailable,
    "CANCELLED": Cancelled,
    "ABORTED": ExpertUnavailable,
    "FAILED_PRECONDITION": StalePlacement,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "DATA_LOSS": WireError,
    "UNIMPLEMENTED": ConfigError,
}


def to_call_error(error: BaseException) -> expert_pb2.CallError:
    """One failed call of a stream. What is no ConsiliumError is a bug here: its text stays here."""
    if isinstance(error, ConsiliumError):
        return expert_pb2.CallError(code=error.grpc_code, message=error.message, retryable=error.retryable)
    return expert_pb2.CallError(code="INTERNAL", message="internal error; see the worker's log", retryable=False)


def from_call_error(error: expert_pb2.CallError) -> ConsiliumError:
    """The error a peer reported for one call. A code we do not know counts as what it says about retrying."""
    kind = _ERRORS.get(error.code, ConsiliumError)
    if kind.retryable != error.retryable:
        kind = ExpertUnavailable if error.retryable else ConsiliumError
    return kind(error.message)


def from_rpc_error(error: grpc.RpcError) -> ConsiliumError:
    """The error behind a failed RPC."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return ExpertUnavailable(str(error))
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ConfigError(f"the server there does not offer this service ({details}); check the endpoint's port")
    return _ERRORS.get(code.name, ConsiliumError)(details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Answers ConsiliumErrors of unary methods with their gRPC status, and bugs with INTERNAL and a log entry."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        # None for methods nobody implements; the health service's methods have no errors of ours to translate
        if handler is None or not inspect.iscoroutinefunction(handler.unary_unary):
            return handler
        return grpc.unary_unary_rpc_method_handler(
            _translated(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )


def _translated(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def translated(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(request, context)
        except ConsiliumError as error:
            await context.abort(grpc.StatusCode[error.grpc_code], error.message)
        except grpc.aio.AbortError:  # the method has answered already
            raise
        except Exception:
            logger.exception("a bug in this server")
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")

    return translated
