"""One line per request: its id, route, status, duration and token counts, and never a word of its text."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.status import HTTP_500_INTERNAL_SERVER_ERROR
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http_errors import CLIENT_CLOSED_REQUEST
from gateway.metrics import Metrics

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # anything else in a log line could pretend to be another line
_PROBES = frozenset({"/health", "/ready", "/metrics"})
_NO_ROUTE = "none"


class RequestLog:
    """The outermost ASGI layer. It gives every request an id (the client's own `x-request-id` where it is sane)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and log it, whatever becomes of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        sent = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        state["arrival"] = arrival = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST  # unless an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # Answered and logged by then (http_errors); Starlette raises it again, for a server that would log it too.
            status = HTTP_500_INTERNAL_SERVER_ERROR
        finally:
            self._record(scope, status, time.perf_counter() - arrival)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        pattern = getattr(route, "path", _NO_ROUTE)
        self._metrics.answered(pattern, status)
        state = scope["state"]
        job = state.get("job")
        log.log(
            logging.DEBUG if pattern in _PROBES else logging.INFO,
            "request=%s route=%s status=%d seconds=%.3f%s",
            state["request_id"],
            pattern,
            status,
            seconds,
            "" if job is None else " " + job.summary(),
        )
