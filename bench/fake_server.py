"""A server that streams tokens at a fixed pace and computes nothing: what is measured against it is the client.

Every event says when (CLOCK_MONOTONIC, shared by the processes of a machine) it was handed to the system.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n"
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


async def serve(interval: float) -> None:
    """Serve on a free port, print it, and stream a token every ``interval`` seconds to every client."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b"{}"
                await _answer(writer, head.split()[1], json.loads(body), interval)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _answer(writer: asyncio.StreamWriter, path: bytes, body: dict[str, Any], interval: float) -> None:
    if path == b"/v1/models":
        writer.write(_HEAD % b"application/json" + _chunk(b'{"data":[{"id":"fake"}]}') + _chunk(b""))
    elif path in (b"/v1/completions", b"/v1/chat/completions"):
        writer.write(_HEAD % b"text/event-stream")
        await _stream(writer, body["max_tokens"], interval)
    else:
        writer.write(_NOT_FOUND)
    await writer.drain()


async def _stream(writer: asyncio.StreamWriter, tokens: int, interval: float) -> None:
    start = time.monotonic()
    for number in range(tokens):
        await asyncio.sleep(start + number * interval - time.monotonic())
        choice = {"index": 0, "text": " word", "delta": {"content": " word"}, "finish_reason": None}
        _send(writer, {"id": "fake", "choices": [choice], "sent": time.monotonic()})
        await writer.drain()
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    _send(writer, {"id": "fake", "choices": [], "usage": usage, "sent": time.monotonic()})
    writer.write(_chunk(b"data: [DONE]\n\n") + _chunk(b""))


def _send(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    writer.write(_chunk(b"data: " + json.dumps(event).encode() + b"\n\n"))


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
