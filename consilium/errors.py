"""The one error tree: every class says how it looks over gRPC and HTTP, and whether trying again can help."""

from __future__ import annotations

from typing import ClassVar


class ConsiliumError(Exception):
    """Base of every error a user or a peer may see; its text says what to do and never holds a secret."""

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(ConsiliumError):
    """The caller sent something that can never work as sent."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    kind = "invalid_request_error"


class Unauthenticated(InvalidRequest):
    """The caller sent no key, or one that is not known here."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    kind = "authentication_error"


class Forbidden(InvalidRequest):
    """The caller is known, and what it asks for is not for it."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403
    kind = "permission_error"


class UnknownModel(InvalidRequest):
    """The caller named a model that is not served here."""

    grpc_code = "NOT_FOUND"
    http_status = 404
    kind = "not_found_error"


class TooLarge(InvalidRequest):
    """The body or message is over its size limit."""

    http_status = 413


class Overloaded(ConsiliumError):
    """The queue is full; the same request may work a little later."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    kind = "overloaded_error"
    retryable = True


class NotReady(ConsiliumError):
    """This process takes no work now: it is starting, draining, or has lost a part of itself."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    kind = "unavailable_error"
    retryable = True


class ExpertUnavailable(ConsiliumError):
    """No worker that holds a needed expert can be reached."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    kind = "unavailable_error"
    retryable = True


class Cancelled(ExpertUnavailable):
    """Whoever asked has said that the answer is not wanted any more."""

    grpc_code = "CANCELLED"


class UnreadableWeights(ConsiliumError):
    """A worker cannot read an expert that it holds on its disk (any more); another one may."""

    grpc_code = "ABORTED"
    http_status = 503
    kind = "unavailable_error"
    retryable = True


class StalePlacement(ConsiliumError):
    """A worker was asked for an expert, or a weight version, that it does not hold (any more)."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 503
    kind = "unavailable_error"
    retryable = True


class DeadlineExceeded(ConsiliumError):
    """The answer did not come within the time allowed for it."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    kind = "timeout_error"
    retryable = True


class WireError(ConsiliumError):
    """Bytes from a peer do not mean what their header says."""

    grpc_code = "DATA_LOSS"
    http_status = 502
    kind = "server_error"
    retryable = True


class CheckpointError(ConsiliumError):
    """A model folder is incomplete, damaged, or of a kind that is not supported."""

    grpc_code = "FAILED_PRECONDITION"


class ConfigError(ConsiliumError):
    """The configuration cannot be used; the text names the key."""

    grpc_code = "FAILED_PRECONDITION"
