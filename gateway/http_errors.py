"""Every error as OpenAI writes it: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from consilium.errors import ConsiliumError, Overloaded, Unauthenticated, UnknownModel

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = "1"
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it stands in the log and the metrics

_CODES: dict[type[ConsiliumError], str] = {
    Unauthenticated: "invalid_api_key",
    UnknownModel: "model_not_found",
    Overloaded: "overloaded",
}
_UNEXPECTED = "something went wrong in the gateway; its log says more under this request's x-request-id"


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> dict[str, Any]:
    """The body for any exception; one that is not ours is logged, and shown without its text."""
    if isinstance(error, ConsiliumError):
        return error_object(error.message, error.kind, error.param, _CODES.get(type(error)))
    log.error("unexpected error", exc_info=error)
    return error_object(_UNEXPECTED, ConsiliumError.kind)


def install_error_handlers(app: FastAPI) -> None:
    """All handlers there are."""
    app.add_exception_handler(ConsiliumError, _on_consilium_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_consilium_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ConsiliumError)
    headers = {"Retry-After": RETRY_AFTER_SECONDS} if error.retryable else {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(describe(error), error.http_status, headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown routes and methods; FastAPI raises these itself."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return JSONResponse(error_object(message, "invalid_request_error"), error.status_code, error.headers)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    """Path and query parameters; bodies are checked by gateway.schemas."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    key = str(first["loc"][-1])
    return JSONResponse(error_object(f"{key}: {first['msg']}", "invalid_request_error", key), 400)


async def _on_client_gone(_: Request, error: Exception) -> Response:
    assert isinstance(error, ClientGone)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_unexpected(_: Request, error: Exception) -> Response:
    return JSONResponse(describe(error), 500)
