"""What FastAPI puts together for a route: the gateway, the caller's key, the parsed body."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from consilium.errors import InvalidRequest, TooLarge, Unauthenticated
from gateway.schemas import Body, parse_body
from gateway.state import Gateway

M = TypeVar("M", bound=Body)

MAX_BODY_BYTES = 2 * 2**20


async def get_gateway(request: Request) -> Gateway:
    """The gateway that the app was made with."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayOf = Annotated[Gateway, Depends(get_gateway)]


async def require_key(request: Request, gateway: GatewayOf) -> None:
    """Raise Unauthenticated unless the request carries one of the configured keys, where there are any.

    Digests are compared, all of them and in constant time, so that the time taken tells nothing about a key.
    """
    keys = gateway.config.gateway.api_keys
    if not keys:
        return
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(sent.strip().encode()).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.get_secret_value().encode()).digest()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthenticated("a known API key is needed; send it as `Authorization: Bearer KEY`")


def key_id(request: Request) -> str:
    """What stands for the key that the request carries, whether one is asked for or not; empty without one."""
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not sent.strip():
        return ""
    return hashlib.sha256(sent.strip().encode()).hexdigest()[:16]


def body_of(model: type[M]) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads and parses the body. It raises TooLarge and InvalidRequest."""

    async def read(request: Request) -> M:
        return parse_body(model, await _read_body(request))

    return read


async def _read_body(request: Request) -> bytes:
    """The whole body, never more than the limit of it, whether its length was announced or not."""
    # Without this check any web page could make its visitors' browsers post here: text/plain needs no permission.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise InvalidRequest("the body must be JSON; send `Content-Type: application/json`")
    announced = request.headers.get("content-length", "0")
    parts, size = [], int(announced) if announced.isdigit() else 0
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        raise TooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes; send less at once")
    return b"".join(parts)
