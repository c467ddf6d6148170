"""Answers that end when their client leaves: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.http_errors import ClientGone, describe

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled, and ClientGone raised, as soon as the client leaves.

    The request's body must have been read: after it ``receive`` has nothing but the disconnect to say.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Sends ``events`` as they come.

    The first one is awaited before the status line goes out, so that an error until then has a status of its own.
    A later error is an event with an error object, and the last one. When the client leaves the iterator is closed.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises any error that comes before the first event."""
        async with aclosing(self._events) as events:
            with suppress(ClientGone):
                await until_disconnect(receive, self._send_all(events, send))

    async def _send_all(self, events: AsyncGenerator[bytes, None], send: Send) -> None:
        first = await anext(events)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for each in events:
                await send({"type": "http.response.body", "body": each, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": event(describe(error)), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
