"""One connection to Redis, for one request at a time. Runs on the I/O thread.

Requests are written as one block of the protocol and their replies read one by one, on a connection of redis-py: its
pipelines and commands cost 20 µs of Python for each SET, this costs 4, and the engine's thread waits for every one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from consilium.errors import ConfigError

CONNECT_TIMEOUT = 1.0  # seconds; nobody waits for a connection
_READ_SIZE = 2**18


class CacheFailure(Exception):
    """A request to Redis failed; ``kind`` is for the metrics."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class RedisLink:
    """Connects when a request needs it, and forgets the connection with any failure: a late reply cannot be misread."""

    def __init__(self, url: str) -> None:
        try:
            pool = ConnectionPool.from_url(
                url,
                protocol=2,  # neither this nor anything below needs a command that an access rule might forbid
                driver_info=None,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,  # `call` limits connecting and the request as a whole
                socket_connect_timeout=CONNECT_TIMEOUT,
                socket_read_size=_READ_SIZE,
            )
            self._connection: AbstractConnection = pool.make_connection()
        except (TypeError, ValueError, RedisError) as error:
            raise ConfigError(f"cache.redis: the URL cannot be used: {type(error).__name__}") from None

    @property
    def connected(self) -> bool:
        """Whether a request can be sent at once; may be asked from any thread."""
        return bool(self._connection.is_connected)

    async def call(self, commands: bytes, replies: int, limit: float) -> list[object]:
        """Send commands and read so many replies within ``limit`` seconds. Raises CacheFailure.

        An error reply stands in the list.
        """
        try:
            if not self._connection.is_connected:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await self._connection.connect()
            async with asyncio.timeout(limit):
                await self._connection.send_packed_command([commands], check_health=False)
                return [await self._reply() for _ in range(replies)]
        except BaseException as error:
            await self.close()
            raise self._explain(error) from None

    async def close(self) -> None:
        """Drop the connection without waiting."""
        await self._connection.disconnect(nowait=True)

    async def _reply(self) -> object:
        try:
            reply: object = await self._connection.read_response(disable_decoding=True)
        except ResponseError as error:
            return error
        return reply

    @staticmethod
    def _explain(error: BaseException) -> BaseException:
        # redis-py has a TimeoutError of its own, which is a RedisError.
        if isinstance(error, TimeoutError):
            return CacheFailure("timeout", "it did not answer in time")
        if isinstance(error, RedisError | OSError):
            return CacheFailure("connection", str(error))
        return error


def set_command(key: bytes, value: bytes, ttl_ms: bytes | None) -> bytes:
    """SET, with PX when the value is to expire."""
    if ttl_ms is None:
        return b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value)
    expiry = b"$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl_ms), ttl_ms)
    return b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n%b" % (len(key), key, len(value), value, expiry)


def mget_command(keys: Sequence[bytes]) -> bytes:
    """MGET of all the keys."""
    parts = [b"*%d\r\n$4\r\nMGET\r\n" % (len(keys) + 1)]
    parts += [b"$%d\r\n%b\r\n" % (len(key), key) for key in keys]
    return b"".join(parts)


def refusal(reply: object) -> CacheFailure | None:
    """What is wrong with a reply, when it is an error."""
    if isinstance(reply, OutOfMemoryError):
        return CacheFailure("full", str(reply))
    return CacheFailure("refused", str(reply)) if isinstance(reply, ResponseError) else None
