"""The HTTP application: what answers where. A request's way: body → schemas → job → engine_client → choice → answer."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from starlette.types import ASGIApp

from gateway.dependencies import require_key
from gateway.http_errors import install_error_handlers
from gateway.request_log import RequestLog
from gateway.routes import chat, completions, operations, tokens
from gateway.state import Gateway


def create_app(gateway: Gateway) -> ASGIApp:
    """The app over one gateway. Every route but the probes asks for a key where keys are configured."""
    # No pages of FastAPI's own: they load scripts from elsewhere and would answer without a key.
    app = FastAPI(title="Consilium", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    for routes in (completions, chat, tokens, operations):
        app.include_router(routes.router, dependencies=[Depends(require_key)])
    app.include_router(operations.probes)
    install_error_handlers(app)
    return RequestLog(app, gateway.metrics)
