"""The second level: rows in Redis, shared by gateways and kept when one restarts.

The engine's thread asks, and waits for an answer only while the connection is up and the breaker closed; any other
attempt goes on in the background and merely tells whether to ask again. The I/O thread talks to Redis. Breakers,
counts and outcomes belong to the engine's thread, which gets them through its mailbox.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import repeat

from consilium.config import CacheConfig
from consilium.errors import DeadlineExceeded
from gateway.cache.breaker import Breaker
from gateway.cache.link import CacheFailure, RedisLink, mget_command, refusal, set_command
from gateway.cache.meter import CacheMeter
from gateway.cache.value import RowCodec
from gateway.mailbox import Completion, Mailbox

log = logging.getLogger(__name__)

KEYS_PER_TIMEOUT = 32  # a lookup of more keys gets the configured time again for every so many
WRITE_CHUNK = 16  # rows in one request: between two, the I/O thread turns to the workers' streams
WRITE_TIMEOUT = 1.0  # seconds for one chunk; nobody waits
WRITE_BACKLOG = 32 * 2**20  # most bytes that wait to be written

Rows = list[memoryview | None]  # in the order of the keys; None is a miss


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Rows to be written, one after the other in ``content``."""

    keys: Sequence[bytes]
    content: bytes


class RemoteCache:
    """Rows in one Redis."""

    def __init__(self, config: CacheConfig, url: str, codec: RowCodec, mailbox: Mailbox, meter: CacheMeter) -> None:
        self._codec, self._mailbox, self._meter = codec, mailbox, meter
        self._timeout = config.timeout
        self._ttl = None if config.ttl is None else str(int(config.ttl * 1000)).encode()
        self.breakers = {"read": Breaker(), "write": Breaker()}
        self._links = {"read": RedisLink(url), "write": RedisLink(url)}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._outgoing: asyncio.Queue[Outgoing] = asyncio.Queue()
        self._reading = False
        self._backlog = 0

    @property
    def running(self) -> bool:
        """Whether the I/O thread serves it."""
        return self._loop is not None

    # -- the engine's side ---------------------------------------------------------------------------------------

    async def fetch(self, keys: Sequence[bytes]) -> Rows:
        """What Redis holds under ``keys``; all misses where it cannot be asked or does not answer in time."""
        nothing: Rows = [None] * len(keys)
        if self._loop is None or self._reading or not self.breakers["read"].permit():
            return nothing
        waits = self.breakers["read"].state == "closed" and self._links["read"].connected
        limit = self._timeout * -(-len(keys) // KEYS_PER_TIMEOUT)
        late = CacheFailure("timeout", "it did not answer in time")
        lookup: Completion[Rows] = Completion(time.monotonic() + limit, lambda: self._settle("read", late))
        self._reading = True
        self._run(self._loop, lambda: self._read(keys, limit, lookup))
        if not waits:
            return nothing
        try:
            return await lookup
        except (DeadlineExceeded, CacheFailure):  # counted where it was settled
            return nothing

    def store(self, keys: Sequence[bytes], content: bytes) -> None:
        """Write rows, one after the other in ``content``, when there is time; dropped where Redis does not keep up."""
        full = self._backlog + len(content) > WRITE_BACKLOG
        if self._loop is None or full or not self.breakers["write"].permit():
            self._meter.dropped(len(keys))
            return
        self._backlog += len(content)
        self._loop.call_soon_threadsafe(self._outgoing.put_nowait, Outgoing(keys, content))

    def _settle(self, operation: str, outcome: object) -> None:
        """Tell breaker and metrics how an attempt ended."""
        breaker = self.breakers[operation]
        before = breaker.state
        if isinstance(outcome, CacheFailure):
            self._meter.failed(operation, outcome.kind)
            breaker.failed()
            if before != breaker.state == "open":
                log.warning("Redis: no %s for %g s: %s", operation, breaker.pause, outcome)
        else:
            breaker.succeeded()
            if before != breaker.state:
                log.info("Redis: %s works again", operation)
        self._meter.touch()

    def _finish_read(self, lookup: Completion[Rows], outcome: Rows | CacheFailure, invalid: int) -> None:
        self._reading = False
        if lookup.outcome is None:  # else it came too late, which has been counted
            self._meter.failed("read", "value", invalid)
            self._settle("read", outcome)
            lookup.settle(outcome)

    def _finish_write(self, rows: Outgoing, written: int, failure: CacheFailure | None) -> None:
        self._backlog -= len(rows.content)
        self._meter.written(written)
        self._meter.dropped(len(rows.keys) - written)
        self._settle("write", failure)

    # -- the I/O thread's side -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write what is stored until cancelled."""
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                await self._write(await self._outgoing.get())
        finally:
            self._loop = None
            for link in self._links.values():
                await link.close()

    def _run(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Start ``work`` on the I/O thread."""

        def start() -> None:
            task = loop.create_task(work())
            self._tasks.add(task)  # the loop itself holds on to no task
            task.add_done_callback(self._tasks.discard)

        loop.call_soon_threadsafe(start)

    async def _read(self, keys: Sequence[bytes], limit: float, lookup: Completion[Rows]) -> None:
        outcome: Rows | CacheFailure = CacheFailure("internal", "the lookup ended without an outcome")
        invalid = 0
        try:
            (reply,) = await self._links["read"].call(mget_command(keys), 1, limit)
            refused = refusal(reply)
            if refused is not None:
                raise refused
            if not isinstance(reply, list) or len(reply) != len(keys):
                raise CacheFailure("refused", "the reply to MGET does not fit the request")
            outcome = [self._codec.decode(key, value) for key, value in zip(keys, reply, strict=True)]
            invalid = sum(row is None and value is not None for row, value in zip(outcome, reply, strict=True))
        except CacheFailure as failure:
            outcome = failure
        finally:  # also when a bug ends it: the tier must not stay marked as busy
            self._mailbox.post(lambda: self._finish_read(lookup, outcome, invalid))

    async def _write(self, rows: Outgoing) -> None:
        """Write ``rows``; when that fails, everything else that waits is dropped too."""
        failure: CacheFailure | None = None
        written = 0
        try:
            for start in range(0, len(rows.keys), WRITE_CHUNK):
                replies = await self._links["write"].call(*self._commands(rows, start), WRITE_TIMEOUT)
                refusals = [each for each in map(refusal, replies) if each is not None]
                written += len(replies) - len(refusals)
                if refusals:
                    raise refusals[0]
        except CacheFailure as caught:
            failure = caught
        done = written
        self._mailbox.post(lambda: self._finish_write(rows, done, failure))
        while failure is not None and not self._outgoing.empty():
            self._drop(self._outgoing.get_nowait())

    def _commands(self, rows: Outgoing, start: int) -> tuple[bytes, int]:
        """The commands for the chunk at ``start``, and how many they are."""
        keys, width = rows.keys[start : start + WRITE_CHUNK], self._codec.row_bytes
        view = memoryview(rows.content)[start * width :]
        values = (self._codec.encode(key, view[n * width : (n + 1) * width]) for n, key in enumerate(keys))
        return b"".join(map(set_command, keys, values, repeat(self._ttl))), len(keys)

    def _drop(self, rows: Outgoing) -> None:
        def finish() -> None:
            self._backlog -= len(rows.content)
            self._meter.dropped(len(rows.keys))

        self._mailbox.post(finish)
